"""KV blocks out of a pool and into it: copied within it, or carried elsewhere as bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a pool, seen so that `view[lookup(slots)]` is what belongs to the slots, whatever their shape.

    `axes` are the sizes by which a slot's number is taken apart, the largest first (a slot is tile * 16 + lane where slots lie in
    tiles of 16): as many as the view has leading dimensions, without the first, which is unbounded.
    """

    view: Tensor
    axes: tuple[int, ...] = ()

    def lookup(self, slots: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for size in reversed(self.axes):
            found.append(slots % size)
            slots = slots // size
        return (slots, *reversed(found))


class CacheBlocks:
    """The blocks of a pool whose arrays are `parts`; where whole blocks lie in one piece, a part's slot is a block."""

    def __init__(self, parts: Sequence[Part], blocks: int, slots_per_block: int) -> None:
        self._parts, self._blocks, self._width = parts, blocks, slots_per_block

    def copy(self, copies: Sequence[tuple[int, int]]) -> None:
        """Each (from, to). Raises InputError for a block outside the pool, or one that is read and written."""
        if not copies:
            return
        sources, targets = ([pair[side] for pair in copies] for side in (0, 1))
        if set(sources) & set(targets) or len(set(targets)) < len(targets):
            raise InputError("a KV block is copied onto one that is itself copied, or twice", "name each target once, and no source")
        for part in self._parts:
            part.view[part.lookup(self._slots(targets))] = part.view[part.lookup(self._slots(sources))]

    def read(self, blocks: Sequence[int]) -> Tensor:
        """uint8 [len(blocks), bytes a block]. Raises InputError for a block outside the pool."""
        slots = self._slots(blocks)
        rows = [part.view[part.lookup(slots)].flatten(1) for part in self._parts]
        return torch.cat([row.contiguous().view(torch.uint8) for row in rows], 1)

    def write(self, blocks: Sequence[int], data: Tensor) -> None:
        """What `read` gave. Raises InputError when `data` has another shape."""
        slots = self._slots(blocks)
        shapes = [part.view[part.lookup(slots[:0])].shape[1:] for part in self._parts]  # of one block
        sizes = [shape.numel() * part.view.element_size() for shape, part in zip(shapes, self._parts, strict=True)]
        if data.dtype != torch.uint8 or tuple(data.shape) != (len(blocks), sum(sizes)):
            raise InputError(
                f"{len(blocks)} KV blocks of this pool are {len(blocks)} x {sum(sizes):,} bytes, the data is {list(data.shape)} of {data.dtype}",
                "give what a pool of the same model, block size and KV type has read",
            )
        for part, shape, piece in zip(self._parts, shapes, torch.split(data, sizes, 1), strict=True):
            part.view[part.lookup(slots)] = piece.contiguous().view(part.view.dtype).view(len(blocks), *shape)

    def _slots(self, blocks: Sequence[int]) -> Tensor:
        """[blocks, slots a block]."""
        index = np.array(blocks, np.int64)
        if index.size and (index.min() < 0 or index.max() >= self._blocks):
            raise InputError(f"KV block {index[(index < 0) | (index >= self._blocks)][0]} is outside 0 .. {self._blocks - 1}")
        return torch.from_numpy(index[:, None] * self._width + np.arange(self._width))
