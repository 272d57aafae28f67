"""Named arrays in one file, read back into an `Arena` by several threads and checked byte for byte.

Layout: magic, length and checksum of a JSON header, the header, zeros up to a page, then the arrays, each at a multiple of 64 bytes.
The file is read and not mapped: mapped, weights may stream through 4 KiB pages (see `Arena`), and nobody has checked them.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import struct
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armillary.core.errors import FormatError
from armillary.kernels.cpu_library import require
from armillary.kernels.packed_weight import Arena

MAGIC = b"armpack1"
_PAGE, _ALIGNMENT, _PIECE = 4096, 64, 4 << 20
_MAX_HEADER = 64 << 20
_START = struct.Struct("<8sQQ")
_DTYPES = {"uint8": torch.uint8, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class _Array:
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int  # in the body
    nbytes: int


@dataclass(frozen=True, slots=True)
class PackedFile:
    """An opened file, of which the header has been read and checked. `about` is what was given to `write`."""

    path: Path
    about: Mapping[str, Any]
    nbytes: int  # of the body
    _arrays: Mapping[str, _Array]
    _checksum: int
    _start: int  # of the body

    @classmethod
    def open(cls, path: Path) -> PackedFile:
        """Raises FormatError for a file that is not one, is cut short or damaged in its header, and OSError."""
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(_START.size)
            if len(start) < _START.size or not start.startswith(MAGIC):
                raise FormatError(f"{path.name} is no file of packed weights", "remove it")
            _, length, checksum = _START.unpack(start)
            if length > min(_MAX_HEADER, size):
                raise FormatError(f"{path.name} has a header of {length:,} bytes in a file of {size:,}", "remove it")
            raw = file.read(length)
        if len(raw) < length or _checksum_of(raw) != checksum:
            raise FormatError(f"the header of {path.name} is damaged", "remove it")
        try:
            header = json.loads(raw)
            body, total, about = int(header["bytes"]), int(header["checksum"], 16), dict(header["about"])
            arrays = {str(name): _entry(*entry, limit=body) for name, entry in header["arrays"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FormatError(f"the header of {path.name} cannot be read ({str(error)[:80]})", "remove it") from None
        begin = _up(_START.size + length, _PAGE)
        if begin + body != size:
            raise FormatError(f"{path.name} has {size:,} bytes; its header says {begin + body:,}", "remove it")
        return cls(path, about, body, arrays, total, begin)

    def load(self, arena: Arena) -> dict[str, Tensor]:
        """Every array, in memory of `arena`. Raises FormatError when a byte is not the one that was written, and OSError."""
        memory = arena.take(self.nbytes)
        view, lib = memory.numpy().data, _library()
        with self.path.open("rb", buffering=0) as file:
            descriptor = file.fileno()

            def read(piece: tuple[int, int]) -> int:
                at, end = piece
                done = at
                while done < end:
                    got = os.preadv(descriptor, [view[done:end]], self._start + done)
                    if got == 0:
                        raise FormatError(f"{self.path.name} became shorter while it was read", "start again")
                    done += got
                return int(lib.arm_checksum(memory.data_ptr() + at, end - at, at))

            pieces = [piece for array in self._arrays.values() for piece in _pieces(array.offset, array.nbytes)]
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                found = sum(pool.map(read, pieces)) % 2**64
        if found != self._checksum:
            raise FormatError(f"{self.path.name} is damaged: its arrays are not those that were written", "remove it")
        return {
            name: memory[array.offset : array.offset + array.nbytes].view(array.dtype).view(array.shape)
            for name, array in self._arrays.items()
        }


def write(path: Path, arrays: Mapping[str, Tensor], about: Mapping[str, Any], partial: str = ".partial-") -> int:
    """A whole file at `path`, or none, whatever other processes write there; gives its size.

    `arrays` are contiguous; `about` is JSON; until it is whole, the file's name begins with `partial`. Raises OSError.
    """
    offset, total, entries = 0, 0, {}
    names = {dtype: name for name, dtype in _DTYPES.items()}
    lib = _library()
    for name, array in arrays.items():
        size = array.numel() * array.element_size()
        entries[name] = [names[array.dtype], list(array.shape), offset]
        total += sum(int(lib.arm_checksum(array.data_ptr() + at - offset, end - at, at)) for at, end in _pieces(offset, size))
        offset = _up(offset + size, _ALIGNMENT)
    header = json.dumps({"about": about, "arrays": entries, "bytes": offset, "checksum": f"{total % 2**64:016x}"}).encode()
    handle, temporary = tempfile.mkstemp(prefix=partial, dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(_START.pack(MAGIC, len(header), _checksum_of(header)) + header)
            file.write(bytes(-file.tell() % _PAGE))
            for array in arrays.values():
                file.write(array.reshape(-1).view(torch.uint8).numpy().data)
                file.write(bytes(-file.tell() % _ALIGNMENT))
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return size


def _entry(dtype: str, shape: list[int], offset: int, *, limit: int) -> _Array:
    nbytes = _DTYPES[dtype].itemsize
    for size in shape:
        if not 0 <= int(size) <= limit:
            raise ValueError(f"a dimension of {size}")
        nbytes *= int(size)
    if not 0 <= offset <= limit - nbytes or offset % _ALIGNMENT:
        raise ValueError(f"{nbytes} bytes at {offset}")
    return _Array(_DTYPES[dtype], tuple(map(int, shape)), offset, nbytes)


def _pieces(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """[begin, end) of the parts of an array that are read and checked one by one."""
    for at in range(0, size, _PIECE):
        yield offset + at, offset + min(size, at + _PIECE)


def _checksum_of(raw: bytes) -> int:
    return int(_library().arm_checksum(raw, len(raw), 0))


def _library() -> ctypes.CDLL:
    lib = require()
    lib.arm_checksum.restype = ctypes.c_uint64
    lib.arm_checksum.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint64]
    return lib


def _up(size: int, to: int) -> int:
    return -(-size // to) * to
