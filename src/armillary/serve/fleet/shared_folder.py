"""The folder in memory that the workers of a fleet share: for its user alone, and gone with the server, however that ended."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from pathlib import Path
from typing import Final

MEMORY: Final = Path("/dev/shm")
_PREFIX: Final = "armillary-kv-"


def shared_folder() -> Path:
    """A name that says whose it is; nothing is made yet."""
    parent = MEMORY if MEMORY.is_dir() else Path(tempfile.gettempdir())
    return parent / f"{_PREFIX}{os.getpid()}-{secrets.token_hex(8)}"


def make_alone(folder: Path) -> None:
    """Make it, and remove those of servers that were killed. Raises OSError."""
    for other in folder.parent.glob(f"{_PREFIX}*"):
        owner = other.name.removeprefix(_PREFIX).partition("-")[0]
        if owner.isdecimal() and not _lives(int(owner)):
            shutil.rmtree(other, ignore_errors=True)
    folder.mkdir(mode=0o700)


def _lives(process: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        try:
            os.kill(process, 0)
        except PermissionError:
            return True  # of another user
        return True
    return False
