"""Which file, and which version of it: what is made from a file is told by it from what was made from its predecessor."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when it was opened. Its change time (ns) moves with every write, even where the modification time was put back."""

    path: Path
    size: int
    modified: int
    changed: int

    @classmethod
    def of(cls, path: Path, descriptor: int | None = None) -> FileStamp:
        """Of the open file `descriptor`, or else of what is at `path` now. Raises OSError."""
        status = path.stat() if descriptor is None else os.fstat(descriptor)
        return cls(path.resolve(), status.st_size, status.st_mtime_ns, status.st_ctime_ns)
