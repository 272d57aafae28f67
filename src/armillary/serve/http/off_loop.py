"""Work that would hold up the event loop goes to a thread."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
INLINE_CHARACTERS = 4_096  # about a millisecond of tokenising; more goes to a thread so that streams keep flowing


async def off_loop(size: int, work: Callable[[], T]) -> T:
    """Do work on `size` characters: at once when small, on a thread when it would hold up the event loop."""
    return work() if size <= INLINE_CHARACTERS else await asyncio.to_thread(work)
