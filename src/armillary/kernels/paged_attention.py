"""Attention over a paged cache: new keys and values go to their slots, queries read the slots of their own sequence.

Kwon et al., "PagedAttention" (SOSP 2023): position p of a sequence lives in slot `table[p // B] * B + p % B` of one pool a
layer. The batch is flat and without padding; each sequence is one `Span` of it. Two cases, by the number of new tokens:

    one token   sequences of similar length form a batch: their keys are gathered and padded to the longest.
    a chunk     what is in the cache already and the chunk itself are attended apart, the second causally, and merged by
                their log-sum-exps: no mask of [chunk, length], no gather of keys that are still at hand.

A sequence whose blocks follow each other in the pool is read in place. Query heads that share a key/value head are batched
over it: PyTorch's own grouped attention copies keys on a CPU. Everything that depends on the batch alone (slots, index
tensors, masks) is made once an iteration, not once a layer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.cache_blocks import CacheBlocks, Part

PADDING = 1.25  # sequences share a decode batch when the longest is at most this times the shortest ...
PADDING_TOKENS = 16  # ... plus this
GATHER_BYTES = 8 << 20  # keys gathered at once: a batch that outgrows the processor's cache is split


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's share of the flat batch: `count` new tokens at positions from `start`, and its block table.

    The first `prompt` tokens of the sequence were given, those after them drawn: some bounds on what is read hold for either alone.
    """

    start: int
    count: int
    blocks: Sequence[int]
    prompt: int = 0


class PagedCache:
    """The pool: per layer, keys and values of `num_blocks * block_size` slots, each [slots, kv heads, head_dim].

    Zeroed lazily by the operating system: a pool takes memory as it is first written.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value in (("num_blocks", num_blocks), ("block_size", block_size)):
            if value < 1:
                raise InputError(f"{name} is {value}", "a cache needs at least 1", field=name)
        shape = (num_blocks * block_size, num_kv_heads, head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [lazy_zeros(shape, dtype, device) for _ in range(num_layers)]
        self.values = [lazy_zeros(shape, dtype, device) for _ in range(num_layers)]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    @property
    def contents(self) -> CacheBlocks:
        """The blocks as bytes."""
        rows = [Part(tensor.view(self.num_blocks, -1)) for tensor in (*self.keys, *self.values)]
        return CacheBlocks(rows, self.num_blocks, 1)


class PagedAttend:
    """An `Attend` for one iteration: `spans` in the order of the flat batch.

    Runs of one-token spans are batched where they stand next to each other; put them first, sorted by length.
    Raises InputError when a span needs more blocks than its table has, or names one outside the pool.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span]) -> None:
        self._cache = cache
        self._spans = tuple(spans)
        self._device = cache.keys[0].device
        tables = [checked_table(span, cache) for span in self._spans]
        self._slots = [
            slots_below(table, span.start + span.count, cache.block_size) for table, span in zip(tables, self._spans, strict=True)
        ]
        new = [slots[span.start :] for slots, span in zip(self._slots, self._spans, strict=True)]
        self._new = self._tensor(np.concatenate(new) if new else np.empty(0, np.int64))
        self._segments: dict[int | None, list[_Decode | _Chunk]] = {}

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D]; returns [T, Hq, D]."""
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        keys.index_copy_(0, self._new, k)
        values.index_copy_(0, self._new, v)
        segments = self._segments.get(spec.window)
        if segments is None:
            segments = self._segments[spec.window] = self._plan(spec.window)
        if len(segments) == 1:
            return segments[0].attend(spec, q, k, v, keys, values)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        for part in segments:
            rows = part.rows
            out[rows] = part.attend(spec, q[rows], k[rows], v[rows], keys, values)
        return out

    def _plan(self, window: int | None) -> list[_Decode | _Chunk]:
        """Cut the batch into decode batches and chunks, for layers with this sliding window."""
        segments: list[_Decode | _Chunk] = []
        row_bytes = self._cache.keys[0][0].nbytes
        together: list[int] = []
        row = 0

        def close() -> None:
            if together:
                segments.append(self._decode(slice(row - len(together), row), together, window))
                together.clear()

        for i, span in enumerate(self._spans):
            if span.count != 1:
                close()
                segments.append(self._chunk(slice(row, row + span.count), i, window))
            else:
                lengths = [self._seen(j, window) for j in (*together, i)]
                if max(lengths) > min(lengths) * PADDING + PADDING_TOKENS or max(lengths) * len(lengths) * row_bytes > GATHER_BYTES:
                    close()
                together.append(i)
            row += span.count
        close()
        return segments

    def _seen(self, i: int, window: int | None) -> int:
        """How many positions the last token of span i sees."""
        length = len(self._slots[i])
        return length if window is None else min(length, window)

    def _decode(self, rows: slice, spans: Sequence[int], window: int | None) -> _Decode:
        seen = [self._slots[i][-self._seen(i, window) :] for i in spans]
        if len(seen) == 1:
            return _Decode(rows, self._where(seen[0]), None)
        lengths = np.array([len(slots) for slots in seen])
        longest = int(lengths.max())
        # Padding reads the sequence's own first slot, never one of another sequence: what is not finite there stays there.
        index = np.empty((len(seen), longest), np.int64)
        for line, slots in zip(index, seen, strict=True):
            line[: len(slots)] = slots
            line[len(slots) :] = slots[0]
        mask = None
        if int(lengths.min()) != longest:
            hidden = np.where(np.arange(longest) < lengths[:, None], np.float32(0), np.float32(-np.inf))
            mask = self._tensor(hidden)[:, None, None].to(self._cache.keys[0].dtype)  # [batch, 1, 1, longest]
        return _Decode(rows, self._tensor(index.reshape(-1)), mask)

    def _chunk(self, rows: slice, i: int, window: int | None) -> _Chunk:
        slots, span = self._slots[i], self._spans[i]
        if window is None or len(slots) <= window:
            return _Chunk(rows, self._where(slots[: span.start]) if span.start else None, None)
        first = max(0, span.start - window + 1)
        distance = np.arange(span.start, len(slots))[:, None] - np.arange(first, len(slots))
        hidden = np.where((distance >= 0) & (distance < window), np.float32(0), np.float32(-np.inf))
        return _Chunk(rows, self._where(slots[first:]), self._tensor(hidden).to(self._cache.keys[0].dtype))

    def _where(self, slots: np.ndarray) -> slice | Tensor:
        """The slots as a slice when they follow each other, else as an index."""
        first, last = int(slots[0]), int(slots[-1])
        if last - first == len(slots) - 1 and bool((np.diff(slots) == 1).all()):
            return slice(first, last + 1)
        return self._tensor(slots)

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


@dataclass(frozen=True, slots=True)
class _Decode:
    """`rows` of the batch, one token each. `where`: slots of [batch, longest], flat. `mask`: [batch, 1, 1, longest] or None."""

    rows: slice
    where: slice | Tensor
    mask: Tensor | None

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        batch, kv_heads = q.shape[0], keys.shape[1]
        grouped = q.view(batch, kv_heads, -1, q.shape[2])  # [batch, Hkv, group, D]: the group takes the place of the query positions
        cached_k = _read(keys, self.where).view(batch, -1, *keys.shape[1:]).transpose(1, 2)  # [batch, Hkv, longest, D]
        cached_v = _read(values, self.where).view(batch, -1, *keys.shape[1:]).transpose(1, 2)
        return _attention(spec, grouped, cached_k, cached_v, self.mask)[0].flatten(1, 2)


@dataclass(frozen=True, slots=True)
class _Chunk:
    """`rows` of the batch are consecutive tokens of one sequence.

    Without `mask`, `where` are the slots before the chunk (None: it starts the sequence). With it, `where` are all slots
    that some row sees, and `mask` [rows, slots] says which.
    """

    rows: slice
    where: slice | Tensor | None
    mask: Tensor | None

    def attend(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        heads = q.view(q.shape[0], keys.shape[1], -1, q.shape[2]).permute(1, 2, 0, 3)  # [Hkv, group, rows, D]
        if self.mask is not None:
            assert self.where is not None
            seen_k, seen_v = _over_group(_read(keys, self.where), heads), _over_group(_read(values, self.where), heads)
            out, _ = _attention(spec, heads, seen_k, seen_v, self.mask)
        else:
            out, weight = _attention(spec, heads, _over_group(k, heads), _over_group(v, heads), causal=True)
            if self.where is not None:
                past_k, past_v = _over_group(_read(keys, self.where), heads), _over_group(_read(values, self.where), heads)
                past, past_weight = _attention(spec, heads, past_k, past_v)
                # Two softmaxes over disjoint keys: their outputs, weighted by their normalisers, are one over all keys.
                out = torch.lerp(out, past, torch.sigmoid(past_weight - weight).unsqueeze(-1).to(out.dtype))
        return out.permute(2, 0, 1, 3).flatten(1, 2)


def _read(pool: Tensor, where: slice | Tensor) -> Tensor:
    """[slots, Hkv, D] of the pool: a view when they follow each other."""
    return pool[where] if isinstance(where, slice) else pool.index_select(0, where)


def _over_group(tensor: Tensor, heads: Tensor) -> Tensor:
    """[length, Hkv, D] as [Hkv, group, length, D] without a copy: the group has stride 0."""
    return tensor.transpose(0, 1).unsqueeze(1).expand(-1, heads.shape[1], -1, -1)


def _attention(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + mask) v and the log-sum-exp of each row's scores.

    q: [a, b, rows, D], k and v: [a, b, length, D], mask: broadcastable to [a, b, rows, length], or `causal` with
    rows == length. Returns [a, b, rows, D] and [a, b, rows].
    """
    if spec.softcap is None and q.device.type == "cpu":
        out: Tensor
        lse: Tensor
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=spec.scale)
        return out, lse
    scores = (q @ k.mT).float() * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    if causal:
        rows = scores.shape[-1]
        scores = scores.masked_fill(torch.ones(rows, rows, dtype=torch.bool, device=q.device).triu(1), float("-inf"))
    if mask is not None:
        scores = scores + mask
    lse = scores.logsumexp(-1)
    return functional.softmax(scores, -1).to(v.dtype) @ v, lse


def checked_table(span: Span, cache: PagedCache) -> np.ndarray:
    """The blocks that the span's positions need, as an array; checked."""
    if span.start < 0 or span.count < 1:
        raise InputError(f"a span of {span.count} tokens from position {span.start}", "give at least one token from position 0 on")
    needed = -(-(span.start + span.count) // cache.block_size)
    if len(span.blocks) < needed:
        raise InputError(f"a sequence of {span.start + span.count} tokens needs {needed} KV blocks, its table has {len(span.blocks)}")
    table = np.asarray(span.blocks[:needed], np.int64)
    outside = table[(table < 0) | (table >= cache.num_blocks)]
    if len(outside):
        raise InputError(f"a block table names block {outside[0]}, the pool has {cache.num_blocks}")
    return table


def slots_below(table: np.ndarray, length: int, block_size: int) -> np.ndarray:
    """Slot of each position below `length`."""
    return (table[:, None] * block_size + np.arange(block_size)).reshape(-1)[:length]


def reference_paged_attention(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, cache: PagedCache, spans: Sequence[Span]) -> Tensor:
    """What PagedAttend computes, by plain loops in float64. Writes the cache too. Returns [T, Hq, D] in float64."""
    keys, values = cache.keys[spec.layer], cache.values[spec.layer]
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape, dtype=torch.float64)
    row = 0
    for span in spans:
        for position in range(span.start, span.start + span.count):
            slot = span.blocks[position // cache.block_size] * cache.block_size + position % cache.block_size
            keys[slot], values[slot] = k[row], v[row]
            first = 0 if spec.window is None else max(0, position - spec.window + 1)
            seen = [span.blocks[p // cache.block_size] * cache.block_size + p % cache.block_size for p in range(first, position + 1)]
            for head in range(q.shape[1]):
                scores = keys[seen, head // group].double() @ q[row, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                out[row, head] = scores.softmax(0) @ values[seen, head // group].double()
            row += 1
    return out


def lazy_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """On the CPU, pages that the system zeroes when they are first touched: `torch.zeros` writes every one (9 s for 4 GB)."""
    if torch.device(device).type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    raw = np.zeros(size + 64, dtype=np.uint8)
    start = -raw.ctypes.data % 64  # as torch aligns
    return torch.from_numpy(raw[start : start + size]).view(dtype).view(shape)
