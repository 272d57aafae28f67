"""The files of laid-out weights in the user's cache: which there are, room for one more, and none. Needs no torch."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from armillary.core.errors import CapacityError
from armillary.core.paths import cache_dir
from armillary.core.units import format_bytes

SUFFIX = ".armpack"
PARTIAL = ".partial-"  # how the name of a file begins that is being written
LIMIT = 50_000_000_000  # bytes of all kept files; the one that was used longest ago goes first
STALE_SECONDS = 3600  # a file being written that has not changed for so long was left by a process that died


def folder() -> Path:
    return cache_dir() / "weights"


def kept() -> list[Path]:
    """The kept files, the one that was used last first."""
    used: dict[Path, float] = {}
    for path in folder().glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            used[path] = path.stat().st_mtime
    return sorted(used, key=lambda path: -used[path])


def clear() -> int:
    """Removes every kept file (an engine that runs has its weights in memory); gives the bytes that it freed."""
    freed = 0
    for path in [*kept(), *_partial(0)]:
        with contextlib.suppress(OSError):
            size = path.stat().st_size
            path.unlink()
            freed += size
    return freed


def make_room(size: int, path: Path) -> None:
    """Removes the files that were used longest ago until `size` bytes at `path` are within LIMIT, and what dead processes left.

    Raises CapacityError when they never are, and OSError.
    """
    for old in _partial(STALE_SECONDS):
        old.unlink(missing_ok=True)
    if size > LIMIT:
        raise CapacityError(f"they take {format_bytes(size)}, and the cache holds {format_bytes(LIMIT)}")
    sizes = {other: other.stat().st_size for other in kept() if other != path}
    for oldest in reversed(list(sizes)):
        if sum(sizes.values()) + size <= LIMIT:
            break
        oldest.unlink(missing_ok=True)
        del sizes[oldest]


def _partial(age: float) -> list[Path]:
    """Files being written that have not changed for `age` seconds."""
    found = []
    for path in folder().glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime >= age:
                found.append(path)
    return found
