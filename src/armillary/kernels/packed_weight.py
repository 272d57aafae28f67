"""Weights laid out once for the products of `cpu/gemm.h`: fp32, fp16, and integers in groups of 32 with an fp16 scale."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import FormatError, InputError
from armillary.kernels.cpu_library import CWeight, require

Format = Literal["fp32", "fp16", "int8", "int4", "int4m"]
_CODES: dict[Format, int] = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int4m": 4}
_BITS: dict[Format, int] = {"fp32": 32, "fp16": 16, "int8": 8, "int4": 4, "int4m": 4}
_GROUP, _PANEL, _TILE = 32, 48, 16
_WIDE_K = 8192  # kWideK of cpu/wide.h
_PIECE = 1 << 19  # weights that one call lays out: enough for the call to cost nothing, few enough for all threads to get some

# GGUF's block types that the kernels take as they are: id, elements and bytes of a block, and the formats that hold them.
# Without loss, but for Q4_K, whose scales and minimums (products of a half and six bits) are rounded to half.
_STORED: dict[str, tuple[int, int, int, tuple[Format, ...]]] = {
    "Q4_0": (2, 32, 18, ("int4", "int4m", "int8")),
    "Q4_1": (3, 32, 20, ("int4m",)),
    "Q8_0": (8, 32, 34, ("int8",)),
    "Q4_K": (12, 256, 144, ("int4m",)),
}


class Arena:
    """Memory for packed weights and caches, asked for in large pieces on huge pages: streaming weights through 4 KiB pages
    cost a quarter of the bandwidth where it was measured (41 against 52 GB/s, two Zen 5 cores)."""

    _PIECE = 64 << 20

    def __init__(self) -> None:
        self._free = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """`nbytes` zeroed bytes, aligned to 64."""
        padded = -(-nbytes // 64) * 64
        if padded > self._free.numel():
            size = max(padded, self._PIECE) + (2 << 20)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                # Private: Python's default is shared memory, which Linux by default never gives huge pages.
                piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                piece.madvise(mmap.MADV_HUGEPAGE)
            else:
                piece = mmap.mmap(-1, size)
            memory = torch.frombuffer(piece, dtype=torch.uint8)
            self._free = memory[-memory.data_ptr() % (2 << 20) :]
        taken, self._free = self._free[:nbytes], self._free[padded:]
        return taken


def takes_straight(kind: str, format: Format | None = None) -> bool:
    """Whether GGUF blocks of type `kind` can be laid out as `format` (None: as any) without becoming floats first."""
    return kind in _STORED and (format is None or format in _STORED[kind][3])


@dataclass(frozen=True, slots=True)
class Blocks:
    """A matrix [n, k] as a GGUF file stores it: `data` [n, bytes of a row] uint8, blocks of type `kind`.

    Raises InputError for a type that no format takes straight, and for rows that are not whole blocks.
    """

    kind: str
    data: np.ndarray

    def __post_init__(self) -> None:
        if self.kind not in _STORED:
            raise InputError(f"blocks of type {self.kind} are not taken as they are", f"dequantise them; {', '.join(_STORED)} are")
        _, _, size, _ = _STORED[self.kind]
        if self.data.dtype != np.uint8 or self.data.ndim != 2 or self.data.shape[1] % size or self.data.strides[1] != 1:
            raise InputError(
                f"{self.data.dtype} data of shape {self.data.shape} are not rows of {self.kind} blocks", f"a block is {size} bytes, uint8"
            )

    @property
    def shape(self) -> tuple[int, int]:
        _, block, size, _ = _STORED[self.kind]
        return self.data.shape[0], self.data.shape[1] // size * block


def interleaved_rows(rows: int, format: Format) -> int:
    """Rows of a weight of two interleaved matrices of `rows` each: whole tiles of both."""
    return 2 * _padded(rows, _width(format))


class PackedWeight:
    """A weight [n, k] in a kernel layout, made of one or more matrices set side by side by columns of the result.

    A matrix is a tensor, or GGUF blocks that `format` takes straight. `interleave`: two matrices (gate and up) whose tiles
    alternate. `bias`: one a matrix, or None. Raises InputError for weights that are NaN or infinite, or too large for the
    half-precision numbers of the format, and for matrices that do not fit each other.
    """

    ARRAYS = ("data", "scales", "minimums", "bias")

    def __init__(
        self,
        matrices: Sequence[Tensor | Blocks],
        format: Format,
        biases: Sequence[Tensor | None] | None = None,
        *,
        interleave: bool = False,
        arena: Arena | None = None,
    ) -> None:
        arena = arena or Arena()
        lib = require()
        self.format: Format = format
        rows, k = [m.shape[0] for m in matrices], matrices[0].shape[1]
        width = _width(format)
        if any(m.shape[1] != k for m in matrices) or (interleave and (len(rows) != 2 or rows[0] != rows[1])):
            raise InputError(f"matrices of shapes {[tuple(m.shape) for m in matrices]} are not one weight", "check the model file")
        for matrix in matrices:
            if isinstance(matrix, Blocks) and not takes_straight(matrix.kind, format):
                raise InputError(f"{matrix.kind} blocks cannot be laid out as {format}", "dequantise them first")
        self.shape = (interleaved_rows(rows[0], format) if interleave else sum(rows), k)
        data, scales, minimums = _sizes(format, self.shape)
        self._data = arena.take(data)
        self._scales = arena.take(scales).view(torch.float16)
        self._minimums = arena.take(minimums).view(torch.float16)
        self._bias: Tensor | None = None
        if biases is not None and any(b is not None for b in biases):
            self._bias = torch.zeros(_padded(self.shape[0], width) + 16, dtype=torch.float32)

        def pack(source: Tensor | np.ndarray, stored: int | None, column: int) -> int:
            if isinstance(source, Tensor):
                address, stride = source.data_ptr(), source.stride(0)
            else:
                address, stride = source.ctypes.data, source.strides[0]
            arguments = (
                ctypes.c_void_p(address),
                source.shape[0],
                k,
                ctypes.c_int64(stride),
                column,
                2 if interleave else 1,
                ctypes.c_void_p(self._data.data_ptr()),
                ctypes.c_void_p(self._scales.data_ptr()),
                ctypes.c_void_p(self._minimums.data_ptr()),
            )
            code = _CODES[format]
            return int(lib.arm_pack(code, *arguments) if stored is None else lib.arm_pack_blocks(code, stored, *arguments))

        pieces: list[tuple[Tensor | np.ndarray, int | None, int]] = []  # rows, their stored type, their first column
        column, size = 0, _padded(max(1, _PIECE // max(1, k)), width)
        for index, matrix in enumerate(matrices):
            source = matrix.data if isinstance(matrix, Blocks) else matrix.detach().to(torch.float32).contiguous()
            kind = _STORED[matrix.kind][0] if isinstance(matrix, Blocks) else None
            for start in range(0, rows[index], size):
                at = 2 * start + index * width if interleave else column + start
                pieces.append((source[start : start + size], kind, at))
            bias = biases[index] if biases is not None else None
            if bias is not None and self._bias is not None:
                for start in range(0, rows[index], width):
                    at = 2 * start + index * width if interleave else column + start
                    part = bias[start : start + width]
                    self._bias[at : at + part.shape[0]] = part.float()
            column += rows[index]
        if len(pieces) == 1:
            faults = [pack(*pieces[0])]
        else:
            with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
                faults = list(pool.map(lambda piece: pack(*piece), pieces))
        if any(faults):
            what = "NaN or infinite values" if 1 in faults else f"values too large for the half-precision numbers of {format}"
            fix = "check the model file" if 1 in faults else "quantise less, or check the model file"
            raise InputError(f"a weight of {rows} rows by {k} has {what}", fix)

    @classmethod
    def restore(cls, format: Format, shape: tuple[int, int], arrays: Mapping[str, Tensor]) -> PackedWeight:
        """A weight from its `arrays()`, which it keeps. Raises FormatError when they do not have the sizes of `format` and `shape`."""
        if format not in _CODES:
            raise FormatError(f"there is no weight format {str(format)[:20]!r}", "lay the weights out again")
        weight = cls.__new__(cls)
        weight.format, weight.shape = format, shape
        empty = torch.empty(0, dtype=torch.float16)
        weight._data, weight._scales = arrays["data"], arrays.get("scales", empty)
        weight._minimums, weight._bias = arrays.get("minimums", empty), arrays.get("bias")
        have = [t.numel() * t.element_size() for t in (weight._data, weight._scales, weight._minimums)]
        bias = weight._bias is None or weight._bias.numel() == _padded(shape[0], _width(format)) + 16
        if have != list(_sizes(format, shape)) or not bias:
            raise FormatError(f"the arrays of a weight of {shape[0]} by {shape[1]} in {format} have the wrong sizes", "lay it out again")
        return weight

    def arrays(self) -> dict[str, Tensor]:
        """The memory that the kernels read, by name: what `restore` takes."""
        every = zip(self.ARRAYS, (self._data, self._scales, self._minimums, self._bias), strict=True)
        return {name: array for name, array in every if array is not None and array.numel()}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self._data, self._scales, self._minimums))

    def struct(self) -> CWeight:
        n, k = self.shape
        return CWeight(
            _CODES[self.format],
            n,
            k,
            0,
            self._data.data_ptr(),
            self._scales.data_ptr() or None,
            self._minimums.data_ptr() or None,
            self._bias.data_ptr() if self._bias is not None else None,
        )

    def unpack(self) -> Tensor:
        """What the packed weight stands for: fp32 [n, k] (of an interleaved weight: in the order of the tiles)."""
        out = torch.empty(self.shape)
        require().arm_unpack(ctypes.byref(self.struct()), ctypes.c_void_p(out.data_ptr()))
        return out

    def multiply(self, x: Tensor, *, wide: bool = False) -> Tensor:
        """x [rows, k] fp32 -> [rows, n], on one thread; `wide` as a step multiplies many rows with 4-bit weights (cpu/wide.h)."""
        if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != self.shape[1]:
            raise InputError(f"the activations are {x.dtype} {tuple(x.shape)}, not float32 [rows, {self.shape[1]}]")
        if wide and (self.format not in ("int4", "int4m") or self.shape[1] > _WIDE_K):
            raise InputError(
                f"a weight of {self.shape[1]} columns in {self.format} has no wide product", f"4 bits and at most {_WIDE_K} have"
            )
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.shape[0])
        product = require().arm_multiply_wide if wide else require().arm_multiply
        product(ctypes.byref(self.struct()), ctypes.c_void_p(x.data_ptr()), x.shape[0], ctypes.c_void_p(out.data_ptr()))
        return out


def _padded(size: int, to: int) -> int:
    return -(-size // to) * to


def _width(format: Format) -> int:
    return _PANEL if format in ("fp32", "fp16") else _TILE


def _sizes(format: Format, shape: tuple[int, int]) -> tuple[int, int, int]:
    """Bytes of a weight's data, scales and minimums."""
    n, k = _padded(shape[0], _width(format)), shape[1]
    if format in ("fp32", "fp16"):
        return n * k * _BITS[format] // 8, 0, 0
    k = _padded(k, _GROUP)
    scales = 2 * n * k // _GROUP
    return n * k * _BITS[format] // 8, scales, scales if format == "int4m" else 0
