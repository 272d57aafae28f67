"""Attention over what was attended to most: keys and values are evicted head by head (H2O; Zhang et al., NeurIPS 2023).

Every layer and key/value head keeps `heavy` tokens whose keys have gathered the most attention, summed over all queries so
far and over the query heads that share the head, and the last `recent`. All heads keep equally many, so the kept ones lie
side by side in the first slots of the sequence's own blocks, in the order of their positions, each head's its own: what is
evicted is given back as whole blocks. Keys keep the rotation of their positions.

Eviction happens where the number of computed tokens is a multiple of the block size, a fact of the sequence, not of how it
was cut into iterations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, lazy_zeros, slots_below


@dataclass(frozen=True, slots=True)
class Budget:
    """Tokens kept of each layer and key/value head: `heavy` by their attention, and the last `recent`."""

    heavy: int
    recent: int

    @property
    def total(self) -> int:
        return self.heavy + self.recent

    def kept(self, computed: int, block_size: int) -> int:
        """How many of `computed` tokens are kept: all until the first eviction, then the budget and what has come since the last."""
        evicted = computed // block_size * block_size
        return self.total + computed - evicted if evicted > self.total else computed

    def first_eviction(self, block_size: int) -> int:
        """How many tokens are computed when the first are evicted."""
        return (self.total // block_size + 1) * block_size


class HeavyHitters:
    """What a pool keeps beside its keys and values: each slot's attention so far and its position, per layer and head."""

    def __init__(self, cache: PagedCache, budget: Budget) -> None:
        if budget.recent < 1:
            raise InputError("H2O keeps no recent token", "a query sees itself: give a window of at least 1", field="kv_window")
        slots, heads, _ = cache.keys[0].shape
        self.cache, self.budget = cache, budget
        self.mass = [lazy_zeros((slots, heads), torch.float32, "cpu") for _ in cache.keys]
        self.positions = [lazy_zeros((slots, heads), torch.int32, "cpu") for _ in cache.keys]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.mass, *self.positions))

    def attend(self, spans: Sequence[Span]) -> HeavyHittersAttend:
        return HeavyHittersAttend(self, spans)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of the batch, the first at `position`, which see the sequence's kept `slots`, their own the last of these."""

    rows: slice
    position: int
    slots: Tensor
    evicts: bool
    dense: bool  # nothing has been evicted before


class HeavyHittersAttend:
    """An `Attend` for one iteration over compacted sequences. Until its first eviction a sequence is computed by `PagedAttend`."""

    def __init__(self, state: HeavyHitters, spans: Sequence[Span]) -> None:
        self._state = state
        size, budget = state.cache.block_size, state.budget
        self._pieces, whole, self._whole, row = list[_Piece](), list[Span](), list[int](), 0
        for span in spans:
            slots = torch.from_numpy(slots_below(np.asarray(span.blocks, np.int64), len(span.blocks) * size, size))
            at, end, first = span.start, span.start + span.count, budget.first_eviction(size)
            while at < end:
                upto = min(end, first if at < first else at // size * size + size)
                kept = budget.kept(at, size) + upto - at
                if kept > len(slots):
                    raise InputError(f"a sequence keeps {kept} tokens, its {len(span.blocks)} KV blocks hold {len(slots)}")
                rows = slice(row + at - span.start, row + upto - span.start)
                self._pieces.append(_Piece(rows, at, slots[:kept], upto % size == 0 and upto >= first, at < first))
                if at < first:
                    whole.append(replace(span, count=upto - at))
                    self._whole += range(rows.start, rows.stop)
                at = upto
            row += span.count
        self._paged = PagedAttend(state.cache, whole) if whole else None

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D], evict; returns [T, Hq, D]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._paged is not None:
            out[self._whole] = self._paged(spec, q[self._whole], k[self._whole], v[self._whole])
        for piece in self._pieces:
            found = self._attend(spec, piece, q[piece.rows], k[piece.rows], v[piece.rows])
            if not piece.dense:
                out[piece.rows] = found
            if piece.evicts:
                self._evict(spec.layer, piece.slots)
        return out

    def _attend(self, spec: AttentionSpec, piece: _Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The rows' attention, after which the slots' mass has grown by what each received."""
        cache, layer, slots, count = self._state.cache, spec.layer, piece.slots, len(q)
        mass, positions = self._state.mass[layer], self._state.positions[layer]
        own = slots[-count:]
        at = torch.arange(piece.position, piece.position + count, dtype=torch.int32)
        cache.keys[layer][own], cache.values[layer][own] = k, v
        mass[own], positions[own] = 0.0, at[:, None].expand(-1, mass.shape[1])
        keys, heads = cache.keys[layer][slots], k.shape[1]
        grouped = q.view(count, heads, -1, q.shape[-1]).permute(1, 2, 0, 3)  # [Hkv, group, rows, D]
        scores = (grouped @ keys.permute(1, 2, 0).unsqueeze(1)).float() * spec.scale  # [Hkv, group, rows, kept]
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        distance = at[:, None] - positions[slots].T[:, None]  # [Hkv, rows, kept]
        hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
        weights = scores.masked_fill(hidden.unsqueeze(1), -torch.inf).softmax(-1)
        mass[slots] += weights.sum((1, 2)).T
        mixed = weights.to(v.dtype) @ cache.values[layer][slots].transpose(0, 1).unsqueeze(1)
        return mixed.permute(2, 0, 1, 3).flatten(1, 2)

    def _evict(self, layer: int, slots: Tensor) -> None:
        """Keeps the budget's: the heaviest before the recent ones, and these, in their order, in the first slots."""
        state, recent = self._state, self._state.budget.recent
        mass = state.mass[layer][slots]  # [kept, Hkv]
        heavy = mass[: len(slots) - recent].topk(state.budget.heavy, 0).indices.sort(0).values
        last = torch.arange(len(slots) - recent, len(slots))[:, None].expand(-1, mass.shape[1])
        kept = torch.cat((heavy, last))  # [budget, Hkv]
        to = slots[: len(kept)]
        for pool in (state.mass[layer], state.positions[layer]):
            pool[to] = pool[slots].gather(0, kept)
        for pool in (state.cache.keys[layer], state.cache.values[layer]):
            pool[to] = pool[slots].gather(0, kept.unsqueeze(-1).expand(-1, -1, pool.shape[-1]))
