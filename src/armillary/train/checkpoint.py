"""Checkpoints of a run: layout-free, written in the background, and never half: what a crash leaves behind is the last whole one.

`FOLDER/step-00000100/` holds a safetensors file a rank and manifest.json. It is written as `.step-00000100.part`, forced to the disk and then
renamed, so a folder without a leading dot is whole. Tensors have the names of `models/`, so any layout on any number of ranks loads them.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, TypeVar

import torch.distributed as dist
from torch import Tensor

from armillary.core.errors import InputError
from armillary.train.checkpoint_state import load_state, staged
from armillary.train.checkpoint_storage import (
    CheckpointError,
    Manifest,
    part_file,
    synchronise,
    synchronise_folder,
    write_manifest,
    write_part,
)
from armillary.train.parallel.agreement import from_rank_0, gathered

Value = TypeVar("Value")

COMMIT_SECONDS: Final = 600.0  # how long rank 0 waits for the others' parts
LEAVE_SECONDS: Final = 10.0  # the same, once the run has ended by an error: who has died writes nothing any more
_WHOLE: Final = re.compile(r"step-(\d{8,})(?:-(\d+))?")


class FolderCheckpoints:
    """The `trainer.Checkpoints` of a folder that all ranks see. Keeps the newest `keep`.

    `save` copies the state and returns; a thread writes the copy. One at most is being written: the next `save` waits for it, and raises
    CheckpointError, on all ranks, when it failed. Raises InputError when another process writes here.
    """

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: tuple[Path, Future[None]] | None = None
        self._lock: Any = None
        self._leave_by = math.inf
        self._from_rank_0(self._claim)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        self.wait()
        blocks, body = staged(step, state, self.rank, self.world)
        part = Path(self._from_rank_0(lambda: str(self._new_part(step))))
        self._writing = part, self._thread.submit(self._write, part, blocks, body)

    def failed(self) -> bool:
        if self._writing is None:
            return False
        writing = self._writing[1]
        return writing.done() and writing.exception() is not None

    def leaving(self) -> None:
        self._leave_by = time.monotonic() + LEAVE_SECONDS

    def wait(self) -> None:
        if self._writing is None:
            return
        part, writing = self._writing
        self._writing = None
        failure = writing.exception()
        failures = gathered(None if failure is None else f"{failure}" or type(failure).__name__)
        told = [(rank, text) for rank, text in enumerate(failures) if text is not None]
        if not told:
            return
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        # What rank 0 says of another rank's failure is less than what that rank says.
        rank, text = min(told, key=lambda failed: failed[1].startswith("rank "))
        whole = newest(self.folder)
        left = "no older one exists" if whole is None else f"{whole} is untouched: go on from there"
        raise CheckpointError(
            f"{_name(part)} could not be written{f' by rank {rank}' if self.world > 1 else ''} ({text})", f"free disk space; {left}"
        ) from failure

    def restore(self, state: Mapping[str, Any]) -> int | None:
        """As the protocol says. Warns of unfinished checkpoints; raises FormatError for a damaged one, InputError for another model's."""
        chosen = self._from_rank_0(self._newest_told)
        if chosen is None:
            return None
        manifest = Manifest.read(Path(chosen))
        self._check_parts(manifest)
        load_state(manifest, state, self.rank, self.world)
        return manifest.step

    def close(self) -> None:
        """Waits, and lets another process write here."""
        self.wait()
        self._thread.shutdown()
        if self._lock is not None:
            self._lock.close()

    def _claim(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = _locked(self.folder)

    def _write(self, part: Path, blocks: Mapping[str, Tensor], body: dict[str, Any]) -> None:
        try:
            told = write_part(part / part_file(self.rank), blocks)
            _write_json(part / f"{part_file(self.rank)}.json", told)
            if self.rank == 0:
                self._commit(part, body)
        except BaseException:
            with contextlib.suppress(OSError):
                (part / f"{part_file(self.rank)}.failed").touch()  # rank 0 need not wait for it
            raise

    def _commit(self, part: Path, body: dict[str, Any]) -> None:
        """Rank 0, once every rank's part is on the disk: the manifest, the rename, and the oldest ones go."""
        deadline = time.monotonic() + COMMIT_SECONDS
        notes = {part_file(rank): part / f"{part_file(rank)}.json" for rank in range(self.world)}
        for file, note in notes.items():
            while not note.exists():
                if (part / f"{file}.failed").exists() or time.monotonic() > min(deadline, self._leave_by):
                    raise CheckpointError(f"rank {file[5:10].lstrip('0') or '0'} did not write its part")
                time.sleep(0.01)
        parts = {file: json.loads(note.read_text(encoding="utf-8")) for file, note in notes.items()}
        for note in notes.values():
            note.unlink()
        write_manifest(part, {**body, "parts": parts})
        part.rename(self.folder / _name(part))
        synchronise_folder(self.folder)
        for old in whole_checkpoints(self.folder)[: -self.keep]:
            _remove(old)

    def _new_part(self, step: int) -> Path:
        for stale in self.folder.glob(".step-*"):
            shutil.rmtree(stale, ignore_errors=True)
        for attempt in itertools.count(1):
            name = f"step-{step:08}" if attempt == 1 else f"step-{step:08}-{attempt}"
            if not (self.folder / name).exists():
                part = self.folder / f".{name}.part"
                part.mkdir()
                return part
        raise AssertionError("unreachable: some number is free")

    def _newest_told(self) -> str | None:
        for part in sorted(self.folder.glob(".step-*.part")):
            warnings.warn(f"{part} was not finished when its run ended: ignored", stacklevel=3)
        chosen = newest(self.folder)
        return None if chosen is None else str(chosen)

    def _check_parts(self, manifest: Manifest) -> None:
        """Every part's bytes, shared among the ranks; the error of one is raised on all."""
        failure = None
        try:
            for part in sorted(manifest.parts)[self.rank :: self.world]:
                manifest.check(part)
        except InputError as error:
            failure = error
        first = next((told for told in gathered(failure) if told is not None), None)
        if first is not None:
            raise first

    def _from_rank_0(self, make: Callable[[], Value]) -> Value:
        def named() -> Value:
            try:
                return make()
            except OSError as error:
                fix = "check its permissions and the free space"
                raise CheckpointError(f"{self.folder} cannot be used ({error.strerror})", fix) from error

        return from_rank_0(named)


def whole_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a folder, oldest first."""
    found = [(int(match[1]), int(match[2] or 1), path) for path in folder.glob("step-*") if (match := _WHOLE.fullmatch(path.name))]
    return [path for _, _, path in sorted(found)]


def newest(folder: Path) -> Path | None:
    """The newest finished checkpoint of a folder."""
    return next(reversed(whole_checkpoints(folder)), None)


def _name(part: Path) -> str:
    return part.name.removeprefix(".").removesuffix(".part")


def _remove(checkpoint: Path) -> None:
    """Out of sight first: a half-removed one must not look whole."""
    hidden = checkpoint.with_name(f".{checkpoint.name}.old")
    checkpoint.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file)
        synchronise(file)
    temporary.rename(path)


def _locked(folder: Path) -> Any:
    """A lock that the system takes back when the process dies, however it dies."""
    file = (folder / ".lock").open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(f"another process trains into {folder}", "wait for it, or end it first") from None
    except OSError:  # a file system without locks
        pass
    return file
