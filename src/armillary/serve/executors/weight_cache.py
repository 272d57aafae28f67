"""Laid-out weights kept in the user's cache, so that the next start reads them instead of making them (decision 9)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import shutil
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.core.errors import CapacityError, FormatError
from armillary.core.units import format_bytes
from armillary.kernels import cpu_library, packed_file, packed_weight
from armillary.kernels.cpu_step import StepModel
from armillary.kernels.packed_file import PackedFile
from armillary.kernels.packed_weight import Arena
from armillary.models import hf, stored
from armillary.models.file_stamp import FileStamp
from armillary.models.gguf import load, mapping, quant
from armillary.models.stored import Weights
from armillary.serve.executors import kept_files, packed_model
from armillary.serve.executors.packed_model import Kept, LaidOut, Made, Quantisation, step_model

LEAST = 16_000_000  # bytes; what is smaller is laid out in no time
GROWTH = 4  # a file this many times its model's is not kept: from a disk, reading it takes longer than laying out again


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model for the kernels, how it came to be in words, and the thread that is keeping it for the next start, if any."""

    model: StepModel
    words: str
    keeping: threading.Thread | None = None


def prepare(weights: Weights, quantisation: Quantisation, *, release: bool = False, keep: bool = True) -> Prepared:
    """The kept weights of this model where they are whole and of this very file; else laid out, and kept in the background.

    `keep` False neither reads nor writes the cache. What is wrong with a kept file or with keeping is a warning, never an error.
    """
    begin = time.perf_counter()
    about = _about(weights, quantisation) if keep else None
    if about is not None and (made := _read(path_of(weights, quantisation), about)) is not None:
        with contextlib.suppress(FormatError):  # of another version's making: as good as none
            model = step_model(weights.config, Kept(made))
            return Prepared(model, f"read as laid out before in {time.perf_counter() - begin:.2f} s")
    parts = LaidOut(weights, quantisation, release=release)
    model = step_model(weights.config, parts)
    words = f"laid out in {time.perf_counter() - begin:.2f} s"
    if about is None or not _worth_keeping(weights, parts.made):
        return Prepared(model, words)
    thread = threading.Thread(target=_keep, args=(weights, quantisation, about, parts.made), name="keep-weights", daemon=True)
    thread.start()
    return Prepared(model, words, thread)


def path_of(weights: Weights, quantisation: Quantisation) -> Path:
    """One file a model and quantisation: a new version of the model replaces the old one's."""
    source = weights.files[0].path
    stem = re.sub(r"[^A-Za-z0-9._-]", "_", source.stem if len(weights.files) == 1 else source.parent.name)[:80]
    which = hashlib.sha256(str(source).encode(errors="surrogateescape")).hexdigest()[:12]
    return kept_files.folder() / f"{stem}-{quantisation}-{which}{kept_files.SUFFIX}"


def _about(weights: Weights, quantisation: Quantisation) -> dict[str, Any] | None:
    """What must be equal for kept weights to be those that would be laid out now; None when no file says what they are."""
    if not weights.files:
        return None
    files = [[str(file.path), file.size, file.modified, file.changed] for file in weights.files]
    try:
        return {"files": files, "config": repr(weights.config), "quantisation": quantisation, "layout": _layout()}
    except OSError:  # a package whose sources are not files
        return None


@functools.cache
def _layout() -> str:
    """The code that decides what a packed weight is: whenever it changes, kept weights are laid out again. Raises OSError."""
    code = [cpu_library.FOLDER / name for name in ("simd.h", "gemm.h", "pack.cpp")]
    code += [Path(str(module.__file__)) for module in (packed_file, packed_weight, packed_model, stored, load, mapping, quant, hf)]
    digest = hashlib.sha256()
    for path in code:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _read(path: Path, about: dict[str, Any]) -> Made | None:
    try:
        file = PackedFile.open(path)
        if any(file.about.get(key) != value for key, value in about.items()):
            return None
        arrays = file.load(Arena())
        formats = {name: (format, (int(n), int(k))) for name, (format, (n, k)) in file.about["formats"].items()}
    except FileNotFoundError:
        return None
    except (FormatError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        warnings.warn(f"kept weights are not used, they are laid out again: {error}", RuntimeWarning, stacklevel=4)
        return None
    with contextlib.suppress(OSError):
        path.touch()  # it was used now
    return Made(arrays, formats)


def _worth_keeping(weights: Weights, made: Made) -> bool:
    size = _bytes(made)
    return LEAST <= size <= GROWTH * sum(file.size for file in weights.files)


def _bytes(made: Made) -> int:
    return sum(array.numel() * array.element_size() for array in made.arrays.values())


def _keep(weights: Weights, quantisation: Quantisation, about: dict[str, Any], made: Made) -> None:
    path, size = path_of(weights, quantisation), _bytes(made)
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        free = shutil.disk_usage(path.parent).free
        if size > free // 2:
            raise CapacityError(f"they take {format_bytes(size)}; {format_bytes(free)} are free, half of which would be taken at most")
        kept_files.make_room(size, path)  # last, for it removes others
        if all(FileStamp.of(file.path) == file for file in weights.files):  # it may have been overwritten while it was read
            packed_file.write(path, made.arrays, {**about, "formats": made.formats}, kept_files.PARTIAL)
    except (OSError, CapacityError) as error:
        warnings.warn(
            f"the laid-out weights are not kept for the next start ({error}); serve with --weight-cache off to not try",
            RuntimeWarning,
            stacklevel=2,
        )
