"""Attention to the last tokens and to what is looked up of all before them (InfLLM; Xiao et al., NeurIPS 2024).

What has left the window lies in units of 128 tokens. A unit is known by its representatives, the keys that its own time
attended to most; each piece of a sequence looks up, for every key/value head, the units whose representatives answer its
mean query best, and reads the first tokens, these units and the window. All that is far stands at one distance, the
window's, so no position is beyond what the model was trained for, however long the sequence.

The pool is what InfLLM offloads to: it lies in ordinary memory here, and `Reads` counts how much of it comes in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, checked_table, lazy_zeros, slots_below
from armillary.kernels.rope import FAR
from armillary.kernels.seen import REPRESENTATIVES, UNIT, Seen


@dataclass(slots=True)
class Reads:
    """Bytes of keys and values: read, and what dense attention would have read. A piece reads what its queries share once."""

    read: int = 0
    dense: int = 0


class BlockMemory:
    """What a pool keeps for looking up: how much attention each key received within the window, and each unit's representatives.

    `seen`: the first tokens and the window; `units` are looked up beside them. `frequencies(spec)`: radians a position [D/2].
    Raises InputError when units are not whole blocks.
    """

    def __init__(self, cache: PagedCache, seen: Seen, units: int, frequencies: Callable[[AttentionSpec], Tensor]) -> None:
        if UNIT % cache.block_size:
            raise InputError(
                f"a KV block of {cache.block_size} tokens does not divide a unit of {UNIT}", f"use a divisor of {UNIT}", field="block_size"
            )
        slots, heads, dim = cache.keys[0].shape
        self.cache, self.seen, self.units, self.frequencies, self.reads = cache, seen, units, frequencies, Reads()
        self.received = [lazy_zeros((slots, heads), torch.float32, "cpu") for _ in cache.keys]
        shape = (cache.num_blocks, REPRESENTATIVES, heads, dim)  # by a unit's first block
        self.representatives = [lazy_zeros(shape, torch.float32, "cpu") for _ in cache.keys]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.received, *self.representatives))

    def attend(self, spans: Sequence[Span]) -> BlockMemoryAttend:
        return BlockMemoryAttend(self, spans)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of the batch at positions start .. end-1 of one unit; positions from `local` on are its window."""

    rows: slice
    start: int
    end: int
    local: int  # 0 while nothing has left the window
    slots: Tensor  # of the whole sequence
    blocks: Tensor


class BlockMemoryAttend:
    """An `Attend` for one iteration. Until something leaves the window a sequence is computed by `PagedAttend`."""

    def __init__(self, memory: BlockMemory, spans: Sequence[Span]) -> None:
        self._memory, self._pieces, whole, self._whole, row = memory, list[_Piece](), list[Span](), list[int](), 0
        size = memory.cache.block_size
        for span in spans:
            table = checked_table(span, memory.cache)
            slots, blocks = torch.from_numpy(slots_below(table, span.start + span.count, size)), torch.from_numpy(np.array(table))
            at, end = span.start, span.start + span.count
            while at < end:
                upto = min(end, at // UNIT * UNIT + UNIT)
                rows = slice(row + at - span.start, row + upto - span.start)
                piece = _Piece(rows, at, upto, memory.seen.first(at, UNIT), slots[:upto], blocks)
                self._pieces.append(piece)
                if not piece.local:
                    self._whole += range(rows.start, rows.stop)
                    if whole and whole[-1].blocks is span.blocks:
                        whole[-1] = replace(whole[-1], count=whole[-1].count + upto - at)
                    else:
                        whole.append(replace(span, count=upto - at))
                at = upto
            row += span.count
        self._paged = PagedAttend(memory.cache, whole) if whole else None
        self._index = torch.tensor(self._whole)

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D]; returns [T, Hq, D]."""
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._paged is not None:
            out[self._index] = self._paged(spec, q[self._index], k[self._index], v[self._index])
        for piece in self._pieces:
            found = self._attend(spec, piece, q[piece.rows], k[piece.rows], v[piece.rows])
            if piece.local:
                out[piece.rows] = found
            self._remember(spec, piece)
        return out

    def _attend(self, spec: AttentionSpec, piece: _Piece, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        memory, cache, layer, count = self._memory, self._memory.cache, spec.layer, len(q)
        keys, values, received = cache.keys[layer], cache.values[layer], memory.received[layer]
        own, window = piece.slots[piece.start :], piece.slots[piece.local :]
        keys[own], values[own], received[own] = k, v, 0.0
        heads = k.shape[1]
        at = torch.arange(piece.start, piece.end)
        grouped = _grouped(q, heads)  # [Hkv, group, rows, D]
        scores = grouped @ keys[window].permute(1, 2, 0).unsqueeze(1)
        distance = at[:, None] - torch.arange(piece.local, piece.end)
        hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
        seen = values[window].transpose(0, 1)  # [Hkv, window, D]
        far = bool(piece.local) and (spec.window is None or spec.window > memory.seen.rolling)
        if far:
            # As far as the window reaches: turned back to position 0 and on to the window's end, whatever their positions.
            reach = torch.full((count,), memory.seen.rolling)
            distant = _turned(_turned(q, at, memory.frequencies(spec), back=True), reach, memory.frequencies(spec), back=False)
            asked = _grouped(distant, heads)
            where = self._looked_up(spec, piece, asked.mean(2).sum(1))  # [Hkv, far] positions
            head = torch.arange(heads)[:, None]
            far_keys = _turned_heads(keys[piece.slots[where], head], where, memory.frequencies(spec))
            scores = torch.cat((asked @ far_keys.mT.unsqueeze(1), scores), -1)
            seen = torch.cat((values[piece.slots[where], head], seen), 1)
            hidden = torch.cat((torch.zeros(count, where.shape[1], dtype=torch.bool), hidden), -1)
        scores = scores.float() * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        received[window] += weights[..., -len(window) :].sum((1, 2)).T
        row = 2 * keys.shape[2] * keys.element_size()
        memory.reads.read += weights.shape[-1] * heads * row
        memory.reads.dense += piece.end * heads * row
        return (weights.to(v.dtype) @ seen.unsqueeze(1)).permute(2, 0, 1, 3).flatten(1, 2)

    def _looked_up(self, spec: AttentionSpec, piece: _Piece, query: Tensor) -> Tensor:
        """Positions [Hkv, n] that each head reads beside the window: the first tokens, and those of the units that answer `query` [Hkv, D]."""
        memory, sinks = self._memory, self._memory.seen.sinks
        blocks = piece.blocks[torch.arange(0, piece.local, UNIT) // memory.cache.block_size]
        known = memory.representatives[spec.layer][blocks]  # [units, representatives, Hkv, D]
        relevance = torch.einsum("urhd,hd->hu", known, query.float())
        first = -(-sinks // UNIT)  # units that the first tokens begin are read whole, so that all heads read equally many
        relevance[:, :first] = -torch.inf
        count = min(memory.units, relevance.shape[1] - first)
        chosen = relevance.topk(count, -1).indices.sort(-1).values if count > 0 else torch.empty(len(query), 0, dtype=torch.int64)
        units = (chosen.unsqueeze(-1) * UNIT + torch.arange(UNIT)).flatten(1)
        begin = torch.arange(min(first * UNIT, piece.local)).expand(len(query), -1)
        return torch.cat((begin, units), 1)

    def _remember(self, spec: AttentionSpec, piece: _Piece) -> None:
        """The representatives of units that leave the window before the next piece: the keys that received most."""
        memory = self._memory
        gone = memory.seen.first(piece.end, UNIT)
        for start in range(piece.local, gone, UNIT):
            slots = piece.slots[start : start + UNIT]
            best = memory.received[spec.layer][slots].topk(REPRESENTATIVES, 0).indices  # [representatives, Hkv]
            keys = memory.cache.keys[spec.layer][slots[best], torch.arange(best.shape[1])]
            plain = _turned_heads(keys.transpose(0, 1), (start + best).T, memory.frequencies(spec)).transpose(0, 1)
            memory.representatives[spec.layer][piece.blocks[start // memory.cache.block_size]] = plain.float()


def _grouped(q: Tensor, heads: int) -> Tensor:
    """[rows, Hq, D] -> [Hkv, group, rows, D]."""
    return q.view(len(q), heads, -1, q.shape[-1]).permute(1, 2, 0, 3)


def _turned(x: Tensor, positions: Tensor, frequencies: Tensor, *, back: bool) -> Tensor:
    """x [T, H, D] rotated by positions [T], or back from them: by the angles that it was rotated with."""
    near = positions.float()[:, None] * frequencies
    angles = torch.where(
        positions[:, None] < FAR, near, (positions.double()[:, None] * frequencies.double()).remainder(2 * torch.pi).float()
    )
    cos, sin = angles.cos().to(x.dtype)[:, None], angles.sin().to(x.dtype)[:, None]
    sin = -sin if back else sin
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def _turned_heads(keys: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """keys [H, n, D] of positions [H, n] turned back to position 0."""
    return _turned(keys.flatten(0, 1).unsqueeze(1), positions.flatten(), frequencies, back=True).squeeze(1).view(keys.shape)
