"""Prompts attended sparsely, each head by its own pattern (MInference 1.0; Jiang et al., NeurIPS 2024).

Three patterns, of which a search on real queries and keys chooses for each head the one that recalls most attention at equal
work; what exactly is read is found for every prompt from a few of its own queries:

    a-shape         the first tokens and the last ones
    vertical-slash  the columns and the diagonals that gather most of the attention of the last 64 queries
    block-sparse    of blocks of 64 tokens those whose mean key answers the mean query of a block best

The first `sinks` tokens and the last `local` are always read. Work goes by blocks of 64 queries: the keys that any of them
reads are gathered, and each query sees exactly its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention import AttentionSpec
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, checked_table, slots_below

BLOCK = 64
Kind = Literal["a-shape", "vertical-slash", "block-sparse"]
KINDS: tuple[Kind, ...] = ("a-shape", "vertical-slash", "block-sparse")


@dataclass(frozen=True, slots=True)
class Pattern:
    """How a head reads: `sinks` first and `local` last tokens, and for `budget` keys a query beside them what its kind says.

    The kinds cost the same: a-shape reads `budget` more of the last tokens, vertical-slash half of it as columns and half as
    diagonals, block-sparse budget / 64 blocks.
    """

    kind: Kind
    sinks: int
    local: int
    budget: int

    @property
    def reads_all(self) -> int:
        """The most keys of which all are read, whatever is chosen."""
        return self.sinks + self.local + self.budget


@dataclass(slots=True)
class Work:
    """Pairs of a query and a key: those whose scores were computed, and those that dense attention would have computed."""

    computed: int = 0
    dense: int = 0


def sums(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Of the attention [rows, keys] of the last rows, whose last row sees the last key: sums over columns [keys] and diagonals [keys].

    Entry o of the diagonals is what lies o keys before its query. A strided view of the mirrored matrix has them as columns.
    """
    rows, keys = weights.shape
    mirrored = torch.zeros(rows, keys + rows - 1)
    mirrored[:, :keys] = weights.flip(1)
    return weights.sum(0), mirrored.as_strided((rows, keys), (keys + rows - 2, 1), rows - 1).sum(0)


class Index:
    """What one head reads of a prompt's piece: q [rows, D] at positions from `start`, k [start + rows, D]."""

    def __init__(self, pattern: Pattern, q: Tensor, k: Tensor, start: int, scale: float) -> None:
        self.pattern, self.keys = pattern, len(k)
        self._columns = torch.zeros(len(k), dtype=torch.bool)
        self._diagonals = torch.zeros(len(k), dtype=torch.bool)
        self._blocks: Tensor | None = None  # [query blocks, key blocks]
        self._columns[: pattern.sinks] = True
        self._diagonals[: pattern.local + (pattern.budget if pattern.kind == "a-shape" else 0)] = True
        if pattern.kind == "vertical-slash":
            rows = min(BLOCK, len(q))
            scores = (q[-rows:] @ k.T).float() * scale
            ahead = torch.arange(len(k)) > torch.arange(start + len(q) - rows, start + len(q))[:, None]
            columns, diagonals = sums(scores.masked_fill(ahead, -torch.inf).softmax(-1))
            half = pattern.budget // 2
            self._columns[_best(columns, self._columns, half)] = True
            self._diagonals[_best(diagonals, self._diagonals, half)] = True
        elif pattern.kind == "block-sparse":
            mean_q, mean_k = _means(q), _means(k)
            scores = (mean_q @ mean_k.T).float()
            own = (start + (torch.arange(1, len(mean_q) + 1) * BLOCK).clamp(max=len(q)) - 1) // BLOCK  # of a block's last query
            scores = scores.masked_fill(torch.arange(len(mean_k)) > own[:, None], -torch.inf)
            chosen = scores.topk(min(pattern.budget // BLOCK, len(mean_k)), -1)
            self._blocks = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, chosen.indices, chosen.values > -torch.inf)

    def seen(self, row: int, positions: Tensor) -> Tensor:
        """bool [queries, keys]: what the queries at `positions`, of the query block that row `row` of the piece is in, read."""
        distance = positions[:, None] - torch.arange(self.keys)
        allowed = self._diagonals[distance.clamp(min=0)] | self._columns
        if self._blocks is not None:
            allowed |= self._blocks[row // BLOCK].repeat_interleave(BLOCK)[: self.keys]
        return allowed & (distance >= 0)


def _best(values: Tensor, taken: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of `values` that are not `taken` yet."""
    left = values.masked_fill(taken, -torch.inf)
    return left.topk(min(count, int((~taken).sum()))).indices


def _means(x: Tensor) -> Tensor:
    """Means of blocks of 64 rows [rows, D], the last of fewer."""
    return torch.stack([part.mean(0) for part in torch.split(x, BLOCK)])


def recall(pattern: Pattern, q: Tensor, k: Tensor, scale: float, rows: int = BLOCK) -> float:
    """The share of the attention of `rows` queries, spread over a whole prompt q, k [length, D], that the pattern reads."""
    index, length = Index(pattern, q, k, 0, scale), len(q)
    total = 0.0
    at = torch.linspace(length // 2, length - 1, rows).long()
    for position in at.tolist():
        weights = ((k[: position + 1] @ q[position]).float() * scale).softmax(0)
        total += float(weights[index.seen(position, torch.tensor([position]))[0, : position + 1]].sum())
    return total / rows


def search(q: Tensor, k: Tensor, scale: float, sinks: int, local: int, budget: int) -> tuple[Pattern, float]:
    """The kind with the highest recall for one head's queries and keys [length, D], all at the same work, and that recall."""
    found = [(pattern, recall(pattern, q, k, scale)) for pattern in (Pattern(kind, sinks, local, budget) for kind in KINDS)]
    return max(found, key=lambda pair: pair[1])


class SparsePrefill:
    """An `Attend` for one iteration: pieces of prompts longer than a pattern reads go by it, the rest by `PagedAttend`.

    `patterns(layer, head)`: the pattern of a query head. Layers with a sliding window are not touched. `work` is counted up.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span], patterns: Callable[[int, int], Pattern], work: Work) -> None:
        self._cache, self._patterns, self._work = cache, patterns, work
        self._every = PagedAttend(cache, spans)
        bound, rest, row = patterns(0, 0).reads_all, list[Span](), 0
        self._rest_rows, self._pieces = list[int](), list[tuple[int, Span, Tensor]]()
        for span in spans:
            prompt = min(span.count, span.prompt - span.start) if span.count > 1 else 0
            if prompt > 1 and span.start + prompt > bound:
                slots = slots_below(checked_table(span, cache), span.start + prompt, cache.block_size)
                self._pieces.append((row, replace(span, count=prompt), torch.from_numpy(np.ascontiguousarray(slots))))
            else:
                prompt = 0
            if prompt < span.count:
                rest.append(replace(span, start=span.start + prompt, count=span.count - prompt))
                self._rest_rows += range(row + prompt, row + span.count)
            row += span.count
        self._rest = PagedAttend(cache, rest) if rest and self._pieces else None

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D]; returns [T, Hq, D]."""
        if not self._pieces or spec.window is not None:
            return self._every(spec, q, k, v)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        for row, span, slots in self._pieces:
            own = slice(row, row + span.count)
            keys[slots[span.start :]], values[slots[span.start :]] = k[own], v[own]
            seen_k, seen_v = keys[slots], values[slots]
            group = q.shape[1] // k.shape[1]
            for head in range(q.shape[1]):
                out[own, head] = self._attend(spec, head, q[own, head], seen_k[:, head // group], seen_v[:, head // group], span.start)
        if self._rest is not None:
            rows = self._rest_rows
            out[rows] = self._rest(spec, q[rows], k[rows], v[rows])
        return out

    def _attend(self, spec: AttentionSpec, head: int, q: Tensor, k: Tensor, v: Tensor, start: int) -> Tensor:
        index = Index(self._patterns(spec.layer, head), q, k, start, spec.scale)
        out = torch.empty_like(q)
        for begin in range(0, len(q), BLOCK):
            end = min(begin + BLOCK, len(q))
            seen = index.seen(begin, torch.arange(start + begin, start + end))
            gathered = seen.any(0).nonzero().flatten()
            scores = (q[begin:end] @ k[gathered].T).float() * spec.scale
            if spec.softcap is not None:
                scores = torch.tanh(scores / spec.softcap) * spec.softcap
            out[begin:end] = scores.masked_fill(~seen[:, gathered], -torch.inf).softmax(-1).to(v.dtype) @ v[gathered]
            self._work.computed += (end - begin) * len(gathered)
            self._work.dense += sum(range(start + begin + 1, start + end + 1))
        return out
