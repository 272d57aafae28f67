"""Attention of endless sequences over a paged cache: sinks and a rolling window (StreamingLLM; Xiao et al., ICLR 2024).

A query sees the first tokens and the last ones, and the first as if they stood right before these. The window's keys keep
the positions that they were rotated with, for only differences count; for the sinks a query is turned back by the gap, so
keys are never rotated again and nothing drifts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention import AttentionSpec
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, slots_below
from armillary.kernels.seen import Seen


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows of the batch whose window begins at `first`: they see slots `sinks`, and of `window` those up to themselves."""

    rows: slice
    first: int
    own: int  # place of the first row within the window
    sinks: Tensor
    window: Tensor


class RollingAttend:
    """An `Attend` for one iteration. A span's table lacks the blocks that none of its queries sees (`Seen.droppable` of its start).

    `frequencies(spec)`: radians a position [D/2] of a layer's rotary embedding. While nothing is left out for a query it is
    computed by `PagedAttend`. Raises InputError as that does.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span], seen: Seen, frequencies: Callable[[AttentionSpec], Tensor]) -> None:
        self._cache, self._seen, self._frequencies = cache, seen, frequencies
        size, whole, self._whole, self._groups, new, rows = cache.block_size, list[Span](), list[int](), list[_Group](), [], list[int]()
        row = 0
        for span in spans:
            count = 0
            while count < span.count and not seen.first(span.start + count, size):
                count += 1
            if count:
                whole.append(replace(span, count=count))
                self._whole += range(row, row + count)
            if count < span.count:
                dropped = seen.droppable(span.start, size)
                slots = slots_below(np.asarray(span.blocks, np.int64), len(span.blocks) * size, size)
                at = np.arange(span.start + count, span.start + span.count) - dropped * size
                new.append(slots[at])
                rows += range(row + count, row + span.count)
                self._group(span, row, count, torch.from_numpy(slots), dropped * size)
            row += span.count
        self._paged = PagedAttend(cache, whole) if whole else None
        self._new = torch.from_numpy(np.concatenate(new)) if new else None
        self._rows = torch.tensor(rows)

    def _group(self, span: Span, row: int, count: int, slots: Tensor, missing: int) -> None:
        while count < span.count:
            position = span.start + count
            first, end = self._seen.first(position, self._cache.block_size), count + 1
            while end < span.count and self._seen.first(span.start + end, self._cache.block_size) == first:
                end += 1
            window = slots[first - missing : span.start + end - missing]
            self._groups.append(_Group(slice(row + count, row + end), first, position - first, slots[: self._seen.sinks], window))
            count = end

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D]; returns [T, Hq, D]."""
        if self._paged is not None and not self._groups:
            return self._paged(spec, q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if self._paged is not None:
            out[self._whole] = self._paged(spec, q[self._whole], k[self._whole], v[self._whole])
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        assert self._new is not None
        keys.index_copy_(0, self._new, k[self._rows])
        values.index_copy_(0, self._new, v[self._rows])
        sinks = spec.window is None or spec.window > self._seen.rolling  # a narrower window never saw the first tokens
        for group in self._groups:
            out[group.rows] = self._attend(spec, group, q[group.rows], keys, values, sinks and self._seen.sinks > 0)
        return out

    def _attend(self, spec: AttentionSpec, group: _Group, q: Tensor, keys: Tensor, values: Tensor, sinks: bool) -> Tensor:
        heads = keys.shape[1]

        def grouped(x: Tensor) -> Tensor:  # [rows, Hq, D] -> [Hkv, group * rows, D]
            return x.view(len(x), heads, -1, x.shape[-1]).permute(1, 2, 0, 3).flatten(1, 2)

        scores = grouped(q) @ keys[group.window].permute(1, 2, 0)  # [Hkv, group * rows, window]
        distance = torch.arange(group.own, group.own + len(q))[:, None] - torch.arange(len(group.window))
        hidden = distance < 0 if spec.window is None else (distance < 0) | (distance >= spec.window)
        seen = values[group.window]
        if sinks:
            back = grouped(self._turned_back(q, group.first - self._seen.sinks, self._frequencies(spec)))
            scores = torch.cat((back @ keys[group.sinks].permute(1, 2, 0), scores), -1)
            hidden = torch.cat((torch.zeros(len(q), len(group.sinks), dtype=torch.bool), hidden), -1)
            seen = torch.cat((values[group.sinks], seen))
        scores = scores.float() * spec.scale
        if spec.softcap is not None:
            scores = torch.tanh(scores / spec.softcap) * spec.softcap
        scores = scores.view(heads, -1, *hidden.shape).masked_fill(hidden, -torch.inf).flatten(1, 2)
        mixed = scores.softmax(-1).to(seen.dtype) @ seen.transpose(0, 1)  # [Hkv, group * rows, D]
        return mixed.view(heads, -1, len(q), q.shape[-1]).permute(2, 0, 1, 3).flatten(1, 2)

    @staticmethod
    def _turned_back(q: Tensor, by: int, frequencies: Tensor) -> Tensor:
        """q [rows, Hq, D] as it would be rotated `by` positions earlier."""
        angles = by * frequencies.double()
        cos, sin = angles.cos().to(q.dtype), angles.sin().to(q.dtype)
        a, b = q.chunk(2, -1)
        return torch.cat((a * cos + b * sin, b * cos - a * sin), -1)
