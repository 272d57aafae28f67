"""Paged attention on a GPU: what `kernels.paged_attention.PagedAttend` computes, as one Triton kernel for decode and for chunks.

A program owns a tile of queries: a few consecutive tokens of one sequence and the query heads that share one key/value head
(grouped attention reads a key once for its whole group), and walks over the keys that they see with an online softmax
(Milakov & Gimelshein 2018; Dao 2023). A key is found through the block table position by position, so any block size will do.

Few sequences leave most of a card idle, so their keys are split over several programs (flash-decoding): each keeps its
unnormalised sum and the log-sum-exp of its part, and `_merge` weighs them. The reference is
`kernels.paged_attention.reference_paged_attention`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.gpu.device import check_device, operand, processors
from armillary.kernels.paged_attention import PagedCache, Span, checked_table, slots_below

MAX_HEAD_DIM = 256  # above it a tile of keys and one of values outgrow a program's registers and shared memory
MAX_SPLITS = 64
MAX_GROUP = 128  # query heads that share a key/value head: they are the rows of one tile
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True)
class Tiles:
    """The kernel's schedule. `rows`: queries (tokens x heads of a group) of a program; `keys`: keys of a step; powers of two from 16."""

    rows: int
    keys: int
    warps: int
    stages: int


def decode_tiles(group: int, head_dim: int, itemsize: int) -> Tiles:
    """One token a program: its group of heads, padded to the 16 rows that a matrix instruction has at least."""
    return _tiles(max(16, triton.next_power_of_2(group)), head_dim, itemsize)


def chunk_tiles(group: int, head_dim: int, itemsize: int) -> Tiles:
    """Several tokens a program; few in fp32, whose products no matrix instruction computes exactly."""
    return _tiles(max(16 if itemsize == 4 else 64, triton.next_power_of_2(group)), head_dim, itemsize)


def _tiles(rows: int, head_dim: int, itemsize: int) -> Tiles:
    """The largest steps that the offline compiler fits into the registers of sm_80 and sm_90 without spilling, and into AMD's 64 KiB."""
    work = rows * triton.next_power_of_2(head_dim)
    if itemsize == 4:
        return Tiles(rows, 16, 8 if work >= 16 * 256 else 4, 2)
    return Tiles(rows, 32 if head_dim > 128 or work >= 128 * 128 else 64, 8 if work >= 64 * 256 else 4, 2)


@dataclass(frozen=True, slots=True)
class _Part:
    """The spans of one kind. `tiles` [n, 2]: span, its first token in the tile; `longest`: the longest
    sequence. Decode tiles are `splittable`; chunks fill a card by themselves."""

    tiles: Tensor
    schedule: Tiles
    longest: int
    splittable: bool


class GpuPagedAttend:
    """An `Attend` for one iteration on a GPU: `spans` in the order of the flat batch, in any order of lengths.

    The cache holds fp16, bf16 or fp32; queries have its dtype, or are fp32 (keys and values are then widened exactly).
    `splits` cuts the keys of decode rows into that many parts; None: as many as fill the card. The sum's order, hence its
    last bits, follows from it: give a number where a result must not depend on the rest of the batch.
    Raises InputError for a table that is too short or leaves the pool, a head size above MAX_HEAD_DIM, or tensors on a CPU.
    """

    def __init__(self, cache: PagedCache, spans: Sequence[Span], splits: int | None = None) -> None:
        keys = cache.keys[0]
        check_device(keys.device, _attend)
        if keys.dtype not in DTYPES:
            raise InputError(f"the cache holds {keys.dtype}", f"use one of {', '.join(str(dtype) for dtype in DTYPES)}")
        if not 1 <= keys.shape[2] <= MAX_HEAD_DIM:
            raise InputError(
                f"head_dim is {keys.shape[2]}, the GPU kernel takes 1 to {MAX_HEAD_DIM}", "use kernels.paged_attention.PagedAttend"
            )
        if splits is not None and not 1 <= splits <= MAX_SPLITS:
            raise InputError(f"splits is {splits}", f"give 1 to {MAX_SPLITS}, or None")
        self._cache, self._spans, self._splits = cache, tuple(spans), splits
        self._device = keys.device
        tables = [checked_table(span, cache) for span in self._spans]
        new = [slots_below(table, s.start + s.count, cache.block_size)[s.start :] for table, s in zip(tables, self._spans, strict=True)]
        self._new = self._tensor(np.concatenate(new) if new else np.empty(0, np.int64))
        padded = np.zeros((len(tables), max((len(table) for table in tables), default=1)), np.int32)
        for line, table in zip(padded, tables, strict=True):
            line[: len(table)] = table
        self._tables = self._tensor(padded)
        counts = np.array([span.count for span in self._spans], np.int32)
        starts = np.array([span.start for span in self._spans], np.int32)
        self._tokens = int(counts.sum())
        self._lines = self._tensor(np.stack([np.cumsum(counts) - counts, starts, counts], 1).astype(np.int32))
        self._single = counts == 1
        self._parts: dict[tuple[int, torch.dtype], list[_Part]] = {}

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store k and v [T, Hkv, D], attend with q [T, Hq, D]; returns [T, Hq, D]."""
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        self._check(spec, q, keys)
        if k.shape != v.shape or tuple(k.shape) != (self._tokens, *keys.shape[1:]):
            raise InputError(f"k is {list(k.shape)}, v {list(v.shape)}", f"the cache takes {[self._tokens, *keys.shape[1:]]}")
        keys.index_copy_(0, self._new, k.to(keys.dtype))
        values.index_copy_(0, self._new, v.to(values.dtype))
        return self.attend(spec, q)

    def attend(self, spec: AttentionSpec, q: Tensor) -> Tensor:
        """Attend with q [T, Hq, D] to what the cache holds already; returns [T, Hq, D]."""
        keys, values = self._cache.keys[spec.layer], self._cache.values[spec.layer]
        self._check(spec, q, keys)
        q = q if q.stride(2) == 1 else q.contiguous()
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        with torch.cuda.device_of(q):
            for part in self._plan(q.shape[1] // keys.shape[1], q.dtype):
                self._launch(part, spec, q, keys, values, out)
        return out

    def _launch(self, part: _Part, spec: AttentionSpec, q: Tensor, keys: Tensor, values: Tensor, out: Tensor) -> None:
        tiles, kv_heads, head_dim = len(part.tiles), keys.shape[1], keys.shape[2]
        schedule, rows, group = part.schedule, part.schedule.rows, q.shape[1] // kv_heads
        splits = self._choose_splits(part, tiles * kv_heads)
        partial = torch.empty((tiles, kv_heads, splits, rows, head_dim) if splits > 1 else 1, dtype=torch.float32, device=q.device)
        weights = torch.empty((tiles, kv_heads, splits, rows) if splits > 1 else 1, dtype=torch.float32, device=q.device)
        padded = max(16, triton.next_power_of_2(head_dim))
        _attend[(tiles, kv_heads, splits)](
            q,
            keys,
            values,
            out,
            partial,
            weights,
            part.tiles,
            self._lines,
            self._tables,
            float(spec.scale),
            float(spec.softcap or 0.0),
            int(spec.window or 0),
            q.stride(0),
            q.stride(1),
            keys.stride(0),
            keys.stride(1),
            self._tables.stride(0),
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_SIZE=self._cache.block_size,
            CAPPED=spec.softcap is not None,
            WINDOWED=spec.window is not None,
            SPLIT=splits > 1,
            OPERAND=operand(q.dtype, _attend),
            ROWS=rows,
            KEYS=schedule.keys,
            DIMS=padded,
            num_warps=schedule.warps,
            num_stages=schedule.stages,
        )
        if splits > 1:
            _merge[(tiles, kv_heads, rows // group * group)](
                out,
                partial,
                weights,
                part.tiles,
                self._lines,
                splits,
                GROUP=group,
                HEAD_DIM=head_dim,
                ROWS=rows,
                SPLITS=triton.next_power_of_2(splits),
                DIMS=padded,
                num_warps=4,
            )

    def _choose_splits(self, part: _Part, programs: int) -> int:
        """Enough programs for two on each processor of the card, each with at least four steps of keys to walk over."""
        if not part.splittable:
            return 1
        if self._splits is not None:
            return self._splits
        wanted = -(-2 * processors(self._device) // programs)
        return max(1, min(wanted, part.longest // (4 * part.schedule.keys), MAX_SPLITS))

    def _plan(self, group: int, dtype: torch.dtype) -> list[_Part]:
        """The tiles for queries of `dtype` whose heads share keys in groups of `group`: the same for every such layer."""
        if (group, dtype) not in self._parts:
            shape = (group, self._cache.keys[0].shape[2], dtype.itemsize)
            parts = (
                self._part(self._single, decode_tiles(*shape), group, splittable=True),
                self._part(~self._single, chunk_tiles(*shape), group, splittable=False),
            )
            self._parts[group, dtype] = [part for part in parts if len(part.tiles)]
        return self._parts[group, dtype]

    def _part(self, chosen: np.ndarray, schedule: Tiles, group: int, splittable: bool) -> _Part:
        """The tiles of the spans that `chosen` [spans] marks, longest sequence first: the last programs to start are short ones."""
        tokens = schedule.rows // group
        spans = sorted(np.flatnonzero(chosen), key=lambda i: -(self._spans[i].start + self._spans[i].count))
        tiles = [(i, first) for i in spans for first in range(0, self._spans[i].count, tokens)]
        longest = max((self._spans[i].start + self._spans[i].count for i in spans), default=0)
        return _Part(self._tensor(np.array(tiles, np.int32).reshape(-1, 2)), schedule, longest, splittable)

    def _check(self, spec: AttentionSpec, q: Tensor, keys: Tensor) -> None:
        kv_heads, head_dim = keys.shape[1:]
        if q.dim() != 3 or q.shape[0] != self._tokens or q.shape[1] == 0 or q.shape[1] % kv_heads or q.shape[2] != head_dim:
            raise InputError(f"q is {list(q.shape)}", f"give [{self._tokens}, a multiple of {kv_heads}, {head_dim}]")
        if q.shape[1] // kv_heads > MAX_GROUP:
            raise InputError(f"{q.shape[1] // kv_heads} query heads share a key/value head, the GPU kernel takes {MAX_GROUP} at most")
        if q.dtype != keys.dtype and q.dtype != torch.float32:
            raise InputError(f"q is {q.dtype} and the cache {keys.dtype}", "give q the cache's dtype, or float32")
        if q.device != keys.device:
            raise InputError(f"q is on {q.device} and the cache on {keys.device}", "put them on one device")
        if spec.window is not None and spec.window < 1:
            raise InputError(f"the window is {spec.window}", "a position sees at least itself: give 1 or more, or None")
        if spec.softcap is not None and not spec.softcap > 0:
            raise InputError(f"the softcap is {spec.softcap}", "give a number above 0, or None")

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._device)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    weight_ptr,
    tiles_ptr,
    lines_ptr,
    tables_ptr,
    scale,
    softcap,
    window,
    q_token,
    q_head,
    slot_stride,
    head_stride,
    table_stride,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAPPED: tl.constexpr,
    WINDOWED: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """A tile of queries over the keys of one key/value head, or over one part of them (SPLIT): programs (tile, kv head, part).

    q: [T, Hq, HEAD_DIM]; k, v: [slots, Hkv, HEAD_DIM]; out: [T, Hq, HEAD_DIM]; tiles: [n, 2] of (span, first token);
    lines: [spans, 3] of (row in the batch, start, count); partial: [n, Hkv, parts, ROWS, HEAD_DIM] and
    weight: [n, Hkv, parts, ROWS], the log2-sum-exp2 of each row's part.
    """
    TOKENS: tl.constexpr = ROWS // GROUP
    tile, kv_head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span = tl.load(tiles_ptr + 2 * tile)
    first = tl.load(tiles_ptr + 2 * tile + 1)
    line = tl.load(lines_ptr + 3 * span)
    start = tl.load(lines_ptr + 3 * span + 1)
    count = tl.load(lines_ptr + 3 * span + 2)

    r = tl.arange(0, ROWS)
    d = tl.arange(0, DIMS)
    token = first + r // GROUP
    head = kv_head * GROUP + r % GROUP
    used = (r < TOKENS * GROUP) & (token < count)
    row = (line + token).to(tl.int64)
    position = start + token
    wide = d < HEAD_DIM
    q = tl.load(q_ptr + row[:, None] * q_token + head[:, None] * q_head + d[None, :], mask=used[:, None] & wide[None, :], other=0.0)
    q = q.to(OPERAND)

    low = 0
    high = start + tl.minimum(first + TOKENS, count)
    if WINDOWED:
        low = tl.maximum(0, start + first - window + 1)
    if SPLIT:
        share = tl.cdiv(tl.cdiv(high - low, KEYS), tl.num_programs(2)) * KEYS
        low += part * share
        high = tl.minimum(high, low + share)

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    sums = tl.zeros([ROWS, DIMS], tl.float32)
    for begin in range(low, high, KEYS):
        key = begin + tl.arange(0, KEYS)
        there = key < high
        block = tl.load(tables_ptr + span * table_stride + key // BLOCK_SIZE, mask=there, other=0).to(tl.int64)
        at = (block * BLOCK_SIZE + key % BLOCK_SIZE) * slot_stride + kv_head * head_stride
        k = tl.load(k_ptr + at[None, :] + d[:, None], mask=there[None, :] & wide[:, None], other=0.0)  # [DIMS, KEYS]
        scores = tl.dot(q, k.to(OPERAND), input_precision="ieee") * scale
        if CAPPED:  # c tanh(s / c), whose exponential may overflow to infinity without harm
            scores = softcap * (1 - 2 / (tl.exp(2 / softcap * scores) + 1))
        seen = there[None, :] & (key[None, :] <= position[:, None])
        if WINDOWED:
            seen &= key[None, :] > position[:, None] - window
        scores = tl.where(seen, scores * 1.4426950408889634, float("-inf"))
        rising = tl.maximum(highest, tl.max(scores, 1))
        safe = tl.where(rising == float("-inf"), 0.0, rising)  # a row that has seen nothing yet: 0, not NaN
        shrink = tl.exp2(highest - safe)
        share_of = tl.exp2(scores - safe[:, None])
        v = tl.load(v_ptr + at[:, None] + d[None, :], mask=there[:, None] & wide[None, :], other=0.0).to(OPERAND)  # [KEYS, DIMS]
        total = total * shrink + tl.sum(share_of, 1)
        share_of = share_of.to(q_ptr.dtype.element_ty).to(OPERAND)
        sums = tl.dot(share_of, v, sums * shrink[:, None], input_precision="ieee")
        highest = rising

    total = tl.where(total == 0.0, 1.0, total)  # a row that sees nothing of this part: 0, and the weight 2^-inf
    sums = sums / total[:, None]
    if SPLIT:
        line_of = ((tile * tl.num_programs(1) + kv_head) * tl.num_programs(2) + part).to(tl.int64) * ROWS + r
        tl.store(partial_ptr + line_of[:, None] * HEAD_DIM + d[None, :], sums, mask=used[:, None] & wide[None, :])
        tl.store(weight_ptr + line_of, highest + tl.log2(total), mask=used)
    else:
        to = (row * (tl.num_programs(1) * GROUP) + head) * HEAD_DIM
        tl.store(out_ptr + to[:, None] + d[None, :], sums.to(out_ptr.dtype.element_ty), mask=used[:, None] & wide[None, :])


@triton.jit
def _merge(
    out_ptr,
    partial_ptr,
    weight_ptr,
    tiles_ptr,
    lines_ptr,
    splits,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    DIMS: tl.constexpr,
):
    """The parts of one row as one softmax: each weighs 2^(its log2-sum-exp2). Programs (tile, kv head, row); shapes as in `_attend`."""
    tile, kv_head, r = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    span = tl.load(tiles_ptr + 2 * tile)
    token = tl.load(tiles_ptr + 2 * tile + 1) + r // GROUP
    if token < tl.load(lines_ptr + 3 * span + 2):
        part = tl.arange(0, SPLITS)
        d = tl.arange(0, DIMS)
        there = part < splits
        line_of = ((tile * tl.num_programs(1) + kv_head).to(tl.int64) * splits + part) * ROWS + r
        weight = tl.load(weight_ptr + line_of, mask=there, other=float("-inf"))
        weight = tl.exp2(weight - tl.max(weight, 0))
        mask = there[:, None] & (d < HEAD_DIM)[None, :]
        partial = tl.load(partial_ptr + line_of[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        merged = tl.sum(partial * weight[:, None], 0) / tl.sum(weight, 0)
        row = (tl.load(lines_ptr + 3 * span) + token).to(tl.int64)
        to = (row * (tl.num_programs(1) * GROUP) + kv_head * GROUP + r % GROUP) * HEAD_DIM
        tl.store(out_ptr + to + d, merged.to(out_ptr.dtype.element_ty), mask=d < HEAD_DIM)
