"""What planners and `simulate serve` share: files that are asked for are checked before anything is computed, and named when they are written."""

from __future__ import annotations

from pathlib import Path


def checked_folder(*paths: Path | None) -> None:
    """Raises InputError for a path whose folder does not exist, or that is a folder itself."""
    from armillary.core.errors import InputError

    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"the folder {path.absolute().parent} does not exist", "make it, or choose another path")
        if path is not None and path.is_dir():
            raise InputError(f"{path} is a folder", "name a file in it")


def printed(*paths: Path | None) -> None:
    """Tell what was written."""
    for path in paths:
        if path is not None:
            print(f"wrote {path}")
