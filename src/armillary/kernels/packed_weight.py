"""Weights laid out once for the products of `cpu/gemm.h`: fp32, fp16, and integers in groups of 32 with an fp16 scale."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.cpu_library import CWeight, require

Format = Literal["fp32", "fp16", "int8", "int4", "int4m"]
_CODES: dict[Format, int] = {"fp32": 0, "fp16": 1, "int8": 2, "int4": 3, "int4m": 4}
_GROUP, _PANEL, _TILE = 32, 48, 16


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
            piece = mmap.mmap(-1, max(padded, self._PIECE) + (2 << 20))
            if hasattr(mmap, "MADV_HUGEPAGE"):
                piece.madvise(mmap.MADV_HUGEPAGE)
            memory = torch.frombuffer(piece, dtype=torch.uint8)
            self._free = memory[-memory.data_ptr() % (2 << 20) :]
        taken, self._free = self._free[:nbytes], self._free[padded:]
        return taken


class PackedWeight:
    """A weight [n, k] in a kernel layout, made of one or more matrices set side by side by columns of the result.

    `interleave`: two matrices (gate and up) whose tiles alternate. `bias`: one a matrix, or None.
    Raises InputError for NaN or infinite weights.
    """

    def __init__(
        self,
        matrices: Sequence[Tensor],
        format: Format,
        biases: Sequence[Tensor | None] | None = None,
        *,
        interleave: bool = False,
        arena: Arena | None = None,
    ) -> None:
        arena = arena or Arena()
        lib = require()
        self.format: Format = format
        code, k = _CODES[format], matrices[0].shape[1]
        width = _PANEL if code <= 1 else _TILE
        rows = [m.shape[0] for m in matrices]
        if interleave:
            tiles = -(-rows[0] // width)
            n = 2 * tiles * width
        else:
            n = sum(rows)
        padded_n, padded_k = -(-n // width) * width, -(-k // _GROUP) * _GROUP
        self.shape = (n, k)
        bits = {0: 32, 1: 16, 2: 8, 3: 4, 4: 4}[code]
        self._data = arena.take(padded_n * (k if code <= 1 else padded_k) * bits // 8)
        groups = padded_n * padded_k // _GROUP if code > 1 else 0
        self._scales = arena.take(2 * groups).view(torch.float16)
        self._minimums = arena.take(2 * groups if code == 4 else 0).view(torch.float16)
        self._bias: Tensor | None = None
        if biases is not None and any(b is not None for b in biases):
            self._bias = torch.zeros(padded_n + 16, dtype=torch.float32)

        def pack(source: Tensor, column: int) -> None:
            finite = lib.arm_pack(
                code,
                ctypes.c_void_p(source.data_ptr()),
                source.shape[0],
                k,
                ctypes.c_int64(source.stride(0)),
                column,
                ctypes.c_void_p(self._data.data_ptr()),
                ctypes.c_void_p(self._scales.data_ptr()),
                ctypes.c_void_p(self._minimums.data_ptr()),
            )
            if not finite:
                raise InputError(f"a weight of {rows} rows by {k} has NaN or infinite values", "check the model file")

        pieces: list[tuple[Tensor, int]] = []  # source rows and their first column; columns never share a byte
        column = 0
        for index, matrix in enumerate(matrices):
            source = matrix.detach().to(torch.float32).contiguous()
            for start in range(0, rows[index], width):
                at = (2 * (start // width) + index) * width if interleave else column + start
                pieces.append((source[start : start + width], at))
                bias = biases[index] if biases is not None else None
                if bias is not None and self._bias is not None:
                    piece = bias[start : start + width]
                    self._bias[at : at + piece.shape[0]] = piece.float()
            column += rows[index]
        with ThreadPoolExecutor(max(1, torch.get_num_threads())) as pool:
            list(pool.map(lambda piece: pack(*piece), pieces))

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

    def multiply(self, x: Tensor) -> Tensor:
        """x [rows, k] fp32 -> [rows, n], on one thread."""
        x = x.contiguous()
        out = torch.empty(x.shape[0], self.shape[0])
        require().arm_multiply(ctypes.byref(self.struct()), ctypes.c_void_p(x.data_ptr()), x.shape[0], ctypes.c_void_p(out.data_ptr()))
        return out
