"""Opens GGUF files (v2 and v3, little-endian) without trusting them: every count, length and offset is bounded before it is used.

Layout (ggml/docs/gguf.md): magic, version, tensor count, key count; keys with typed values; tensor infos (name, dimensions, type,
offset); padding to the alignment; tensor data. The data stays memory-mapped until a tensor is asked for.
"""

from __future__ import annotations

import itertools
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from armillary.core.errors import FormatError, NotFoundError
from armillary.models.file_stamp import FileStamp
from armillary.models.gguf.types import BY_ID, TensorType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_KEYS = 65_536
MAX_TENSORS = 65_536
MAX_NAME_BYTES = 65_535
MAX_ARRAY_STRINGS = 4_194_304  # four times the largest vocabulary in use
MAX_NESTED_ARRAYS = 65_536
MAX_ARRAY_DEPTH = 4
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 65_536

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<B"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
_DTYPES = {0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "u1", 10: "<u8", 11: "<i8", 12: "<f8"}
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_REPAIR = "the file is damaged or was not written by a GGUF writer; fetch it again"


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One stored tensor; `shape` is row-major (PyTorch's order: the last dimension is contiguous)."""

    name: str
    type: TensorType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    data: np.ndarray  # [rows, row_bytes] uint8, a read-only view of the mapped file

    @property
    def nbytes(self) -> int:
        return int(self.data.nbytes)

    @property
    def elements(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An opened file: `metadata` holds Python scalars, strings, lists of strings and 1-D numpy arrays."""

    path: Path
    version: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GGUFTensor]
    size: int
    stamp: FileStamp | None = None  # none: it was not opened from a path

    @classmethod
    def open(cls, path: str | Path) -> GGUFFile:
        """Maps and validates the file. Raises `NotFoundError` (no such file) or `FormatError` (naming what is out of bounds)."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                stamp = FileStamp.of(path, file.fileno())
                size = stamp.size
                if size < 24:
                    raise FormatError(f"{path.name} has {size} bytes; a GGUF header alone has 24", _REPAIR)
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, IsADirectoryError) as error:
            raise NotFoundError(f"{path} is not a file", "give the path of a .gguf file") from error
        except OSError as error:
            raise FormatError(f"{path} cannot be read ({error.strerror})", "check the path and its permissions") from error
        return replace(_Parser(path, mapped, size).parse(), stamp=stamp)


class _Parser:
    """Walks the header once; `at` is the next unread byte."""

    def __init__(self, path: Path, data: mmap.mmap, size: int) -> None:
        self.path, self.data, self.size, self.at = path, data, size, 0
        self.nested = 0

    def parse(self) -> GGUFFile:
        if self.data[:4] != MAGIC:
            raise self.damage(f"it starts with {self.data[:4]!r} instead of {MAGIC!r}", "give a GGUF file")
        self.at = 4
        version = self.u32("version")
        if version not in VERSIONS:
            if int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS:
                raise self.damage("it is big-endian", "convert it to little-endian with gguf-convert-endian")
            raise self.damage(f"its GGUF version is {version}; versions 2 and 3 can be read", "convert it with a current llama.cpp")
        tensor_count, key_count = self.u64("tensor count"), self.u64("key count")
        self.bound("tensor count", tensor_count, min(MAX_TENSORS, self.size // 24))
        self.bound("key count", key_count, min(MAX_KEYS, self.size // 13))
        metadata = self.keys(key_count)
        infos = [self.tensor_info(index) for index in range(tensor_count)]
        tensors = self.place(infos, self.alignment(metadata))
        return GGUFFile(self.path, version, metadata, tensors, self.size)

    # -- header -----------------------------------------------------------------------------------------------

    def keys(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for index in range(count):
            key = self.string(f"key {index}", MAX_NAME_BYTES)
            if key in metadata:
                raise self.damage(f"key {key!r} occurs twice")
            metadata[key] = self.value(f"key {key!r}", self.u32(f"type of key {key!r}"), depth=0)
        return metadata

    def value(self, what: str, kind: int, depth: int) -> Any:
        if kind == _STRING:
            return self.string(what, self.size)
        if kind == _ARRAY:
            return self.array(what, depth + 1)
        if kind not in _SCALARS:
            raise self.damage(f"{what} has the unknown value type {kind}; 0 to 12 exist")
        value = self.scalar(what, _SCALARS[kind])
        if kind != _BOOL:
            return value
        if value > 1:
            raise self.damage(f"{what} is a boolean with the value {value}")
        return bool(value)

    def array(self, what: str, depth: int) -> Any:
        if depth > MAX_ARRAY_DEPTH:
            raise self.damage(f"{what} nests arrays more than {MAX_ARRAY_DEPTH} deep")
        kind, length = self.u32(f"{what}: element type"), self.u64(f"{what}: length")
        left = self.size - self.at
        if kind == _STRING:
            self.bound(f"{what}: length", length, min(MAX_ARRAY_STRINGS, left // 8))
            return self.strings(what, length)
        if kind == _ARRAY:
            self.nested += length
            self.bound(f"{what}: nested arrays", self.nested, min(MAX_NESTED_ARRAYS, left // 12))
            return [self.array(f"{what}[{index}]", depth + 1) for index in range(length)]
        if kind not in _DTYPES:
            raise self.damage(f"{what} has the unknown element type {kind}; 0 to 12 exist")
        dtype = np.dtype(_DTYPES[kind])
        self.bound(f"{what}: length", length, left // dtype.itemsize)
        values = np.frombuffer(self.data, dtype, length, self.at)
        self.at += values.nbytes
        return values.astype(bool) if kind == _BOOL else values

    def strings(self, what: str, count: int) -> list[str]:
        # A vocabulary has 1e5 strings and more: the plain loop with local names is 5x faster than `self.string`.
        data, at, size, unpack, out = self.data, self.at, self.size, _U64.unpack_from, []
        for index in range(count):
            if at + 8 > size:
                raise self.damage(f"{what}[{index}] lies beyond the end of the file")
            (length,) = unpack(data, at)
            at += 8
            if length > size - at:
                raise self.damage(f"{what}[{index}] has {length} bytes where {size - at} are left")
            try:
                out.append(str(data[at : at + length], "utf-8"))
            except UnicodeDecodeError as error:
                raise self.damage(f"{what}[{index}] is not UTF-8 ({error.reason} at byte {error.start})") from None
            at += length
        self.at = at
        return out

    def tensor_info(self, index: int) -> tuple[str, tuple[int, ...], TensorType, int]:
        name = self.string(f"name of tensor {index}", MAX_NAME_BYTES)
        dimensions = self.u32(f"number of dimensions of {name!r}")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self.damage(f"tensor {name!r} has {dimensions} dimensions; 1 to {MAX_DIMENSIONS} are allowed")
        shape = tuple(self.u64(f"shape of {name!r}") for _ in range(dimensions))[::-1]
        kind = self.u32(f"type of {name!r}")
        if kind not in BY_ID:
            raise self.damage(f"tensor {name!r} has the unknown type {kind}", "convert the model with a type that this version reads")
        return name, shape, BY_ID[kind], self.u64(f"offset of {name!r}")

    def alignment(self, metadata: Mapping[str, Any]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_ALIGNMENT or value & (value - 1):
            raise self.damage(f"general.alignment is {str(value)[:40]}; it must be a power of two up to {MAX_ALIGNMENT}")
        return value

    # -- tensors ----------------------------------------------------------------------------------------------

    def place(self, infos: list[tuple[str, tuple[int, ...], TensorType, int]], alignment: int) -> dict[str, GGUFTensor]:
        start = -(-self.at // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        raw = np.frombuffer(self.data, np.uint8)
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self.damage(f"tensor {name!r} occurs twice")
            if min(shape) < 1:
                raise self.damage(f"tensor {name!r} has the shape {shape}; every dimension must be at least 1")
            if shape[-1] % kind.block:
                raise self.damage(f"tensor {name!r} has rows of {shape[-1]} elements; {kind.name} stores {kind.block} at a time")
            rows = 1
            for size in shape[:-1]:
                rows *= size
            row_bytes = kind.row_bytes(shape[-1])
            if offset % alignment:
                raise self.damage(f"tensor {name!r} starts at offset {offset}, which is not a multiple of the alignment {alignment}")
            begin, length = start + offset, rows * row_bytes
            if begin + length > self.size:
                raise self.damage(f"tensor {name!r} ends at byte {begin + length}; the file has {self.size}")
            data = raw[begin : begin + length].reshape(rows, row_bytes)
            tensors[name] = GGUFTensor(name, kind, shape, begin, data)
        ordered = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(ordered):
            if before.offset + before.nbytes > after.offset:
                raise self.damage(f"tensors {before.name!r} and {after.name!r} overlap at byte {after.offset}")
        return tensors

    # -- bounded reads ----------------------------------------------------------------------------------------

    def scalar(self, what: str, form: struct.Struct) -> Any:
        if self.at + form.size > self.size:
            raise self.damage(f"{what} lies beyond the end of the file ({self.size} bytes)")
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def u32(self, what: str) -> int:
        return int(self.scalar(what, _U32))

    def u64(self, what: str) -> int:
        return int(self.scalar(what, _U64))

    def string(self, what: str, limit: int) -> str:
        length = self.u64(f"length of {what}")
        self.bound(f"length of {what}", length, min(limit, self.size - self.at))
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.damage(f"{what} is not UTF-8 ({error.reason} at byte {error.start})") from None

    def bound(self, what: str, value: int, limit: int) -> None:
        if value > limit:
            raise self.damage(f"{what} is {value:,}; at most {limit:,} fit here")

    def damage(self, problem: str, fix: str = _REPAIR) -> FormatError:
        return FormatError(f"{self.path.name}: {problem}", fix)
