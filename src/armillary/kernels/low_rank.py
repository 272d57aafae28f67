"""What an adapter adds to a product: scale * B (A x) (LoRA, Hu et al. 2021), plainly and laid out for `cpu/low_rank.h`.

A batch's rows may have different adapters or none; rows of one adapter are multiplied together, without padding (Punica,
Chen et al. 2023; S-LoRA, Sheng et al. 2023). Arithmetic is fp32 whatever the weights of the product are.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.cpu_library import PARTS, CLowRank
from armillary.kernels.packed_weight import Arena

_TILE: Final = 16


@dataclass(frozen=True, slots=True)
class LowRank:
    """scale * B A beside a weight [n, k]: `a` [rank, k] and `b` [n, rank] fp32."""

    a: Tensor
    b: Tensor
    scale: float

    def __post_init__(self) -> None:
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:
            raise InputError(f"A {list(self.a.shape)} and B {list(self.b.shape)} are no low-rank pair", "A is [rank, k], B is [n, rank]")

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the weight that it stands beside: [n, k]."""
        return self.b.shape[0], self.a.shape[1]

    @property
    def nbytes(self) -> int:
        return self.a.nbytes + self.b.nbytes

    def __call__(self, x: Tensor) -> Tensor:
        """x [rows, k] -> its term [rows, n], fp32."""
        return functional.linear(functional.linear(x.float(), self.a) * self.scale, self.b)

    def delta(self) -> Tensor:
        """What is to be added to the weight itself: [n, k], fp32."""
        return self.scale * (self.b @ self.a)


Layer = Sequence[LowRank | None]  # one a part, in the order of PARTS


def add_terms(y: Tensor, x: Tensor, segments: Sequence[tuple[Tensor, LowRank | None]]) -> None:
    """Adds in place to y [rows, n] the term of each segment's rows of x [rows, k]; a segment is the rows' indices and what they have."""
    for rows, low in segments:
        if low is not None:
            y[rows] = (y[rows].float() + low(x[rows])).to(y.dtype)


class PackedLowRank:
    """An adapter of a whole decoder in the kernels' layout; `layers[i]` as `Layer`. Its memory goes when nobody holds it.

    Raises InputError when a part does not stand beside a weight of `shapes` (by part), or the number of layers is another.
    """

    def __init__(self, layers: Sequence[Layer], shapes: Sequence[tuple[int, int]], num_layers: int) -> None:
        if len(layers) != num_layers:
            raise InputError(f"the adapter has {len(layers)} layers, the model {num_layers}", "give an adapter of this model")
        sizes = []
        for index, layer in enumerate(layers):
            for name, low, shape in zip(PARTS, layer, shapes, strict=True):
                if low is not None and low.shape != shape:
                    raise InputError(
                        f"layers[{index}].{name} of the adapter stands beside a weight of {list(low.shape)}, the model's is {list(shape)}",
                        "give an adapter of this model",
                    )
                rank, (n, k) = (low.rank if low is not None else 0), shape
                sizes += [_padded(rank) * k, _padded(n) * rank]
        self._memory = Arena().take(4 * sum(sizes)).view(torch.float32)
        self._parts = (CLowRank * (num_layers * len(PARTS)))()
        pieces = iter(torch.split(self._memory, sizes))
        for index, low in enumerate(low for layer in layers for low in layer):
            a, b = next(pieces), next(pieces)
            if low is not None:
                (n, k), rank = low.shape, low.rank
                rows = functional.pad(low.a, (0, 0, 0, -rank % _TILE))
                a.view(-1, k, _TILE).copy_(rows.view(-1, _TILE, k).transpose(1, 2))
                columns = functional.pad(low.b, (0, 0, 0, -n % _TILE))
                b.view(-1, rank, _TILE).copy_(columns.view(-1, _TILE, rank).transpose(1, 2))
                self._parts[index] = CLowRank(a.data_ptr(), b.data_ptr(), rank, low.scale)
        self.num_layers, self.shapes = num_layers, tuple(shapes)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    @property
    def address(self) -> int:
        """Of [layers][PARTS] LowRank, for as long as this object lives."""
        return ctypes.addressof(self._parts)


def _padded(size: int) -> int:
    return -(-size // _TILE) * _TILE
