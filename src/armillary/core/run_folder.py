"""Where a run leaves what it made: a new folder, named after the time."""

from __future__ import annotations

import itertools
import tempfile
from datetime import datetime
from pathlib import Path

from armillary.core.errors import InputError


def check_runs(runs: Path) -> None:
    """Make `runs`, and raise InputError when it cannot be written to: told before minutes of work, not after."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs) as probe:
            probe.write(bytes(65536))  # a name alone fits a full disk
    except OSError as error:
        raise InputError(f"cannot write to the folder {runs} ({error.strerror})", "choose another with --runs") from error


def new_run_folder(runs: Path, now: datetime, name: str = "") -> Path:
    """A new folder named after the UTC time and `name`; of two runs in one second the later gets a number."""
    stamp = now.strftime("%Y%m%dT%H%M%SZ") + (f"-{name}" if name else "")
    for number in itertools.count(1):
        folder = runs / (stamp if number == 1 else f"{stamp}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise AssertionError("unreachable: some number is free")
