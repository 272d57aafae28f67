"""One decoder iteration in one native call: the Python side of `cpu/step.cpp`.

Weights are laid out once (`PackedWeight`), keys and values live in a paged pool of this kernel's own layout (`StepCache`),
and `DecoderStep.forward` runs a flat, padding-free batch through every layer without coming back to Python.
Results do not depend on the number of threads, and with `deterministic` or without 4-bit weights not on what else is in the
batch (see `cpu/gemm.h`, `cpu/wide.h`, `cpu/attention.h`).
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError, CapacityError, FormatError, InputError
from armillary.kernels.activations import ACTIVATIONS, Activation
from armillary.kernels.cache_blocks import CacheBlocks, Part
from armillary.kernels.cpu_library import MAX_HEAD_DIM, PHASES, CBatch, CCache, CLayer, CModel, CSequence, require
from armillary.kernels.low_rank import Layer, PackedLowRank
from armillary.kernels.packed_weight import Arena, PackedWeight, interleaved_rows
from armillary.kernels.seen import PAGE, Seen, page_bound_bytes


@dataclass(frozen=True)
class StepLayer:
    """Weights of one layer. Norm weights are final (any offset added); optional parts are None."""

    qkv: PackedWeight
    o: PackedWeight
    gate_up: PackedWeight
    down: PackedWeight
    attention_norm: Tensor
    mlp_norm: Tensor
    post_attention_norm: Tensor | None
    post_mlp_norm: Tensor | None
    q_norm: Tensor | None
    k_norm: Tensor | None
    window: int | None
    rope: int = 0  # index into StepModel.ropes


@dataclass(frozen=True)
class StepModel:
    """A decoder as the kernel wants it. `embedding` is [vocabulary, hidden], fp32 or fp16. Raises FormatError when a weight has another size.

    The kernels trust these sizes with memory, and weights may come from a file (the weight cache).
    """

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    activation: Activation
    norm_eps: float
    attention_scale: float
    attention_softcap: float | None
    logit_softcap: float | None
    embedding_scale: float
    embedding: Tensor
    final_norm: Tensor
    layers: tuple[StepLayer, ...]
    head: PackedWeight
    ropes: tuple[tuple[Tensor, float], ...]  # one or two: inverse frequencies [head_dim / 2] and the scaling of cosines and sines

    def __post_init__(self) -> None:
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        sizes: dict[str, tuple[Tensor | PackedWeight, tuple[int, ...]]] = {
            "embedding": (self.embedding, (self.vocabulary, self.hidden)),
            "head": (self.head, (self.vocabulary, self.hidden)),
            "final_norm": (self.final_norm, (self.hidden,)),
            **{f"ropes[{index}]": (rope, (self.head_dim // 2,)) for index, (rope, _) in enumerate(self.ropes)},
        }
        expected = {
            "qkv": (q + 2 * kv, self.hidden),
            "o": (self.hidden, q),
            "down": (self.hidden, self.intermediate),
            **dict.fromkeys(("attention_norm", "mlp_norm", "post_attention_norm", "post_mlp_norm"), (self.hidden,)),
            **dict.fromkeys(("q_norm", "k_norm"), (self.head_dim,)),
        }
        for index, layer in enumerate(self.layers):
            parts = ((name, getattr(layer, name), shape) for name, shape in expected.items())
            sizes |= {f"layers[{index}].{name}": (part, shape) for name, part, shape in parts if part is not None}
            both = interleaved_rows(self.intermediate, layer.gate_up.format)
            sizes[f"layers[{index}].gate_up"] = layer.gate_up, (both, self.hidden)
        for name, (part, shape) in sizes.items():
            if tuple(part.shape) != shape:
                raise FormatError(f"{name} has the shape {list(part.shape)}, the model's is {list(shape)}", "give weights of this model")

    @property
    def nbytes(self) -> int:
        """Bytes of packed weights that one decode iteration reads."""
        return self.head.nbytes + sum(w.nbytes for layer in self.layers for w in (layer.qkv, layer.o, layer.gate_up, layer.down))


CACHE_DTYPES = (torch.float32, torch.float16, torch.int8, torch.float8_e4m3fn)  # in the order of CacheFormat in cpu/kv_cache.h


def cache_row_bytes(head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of one head's key (or value) of one token: int8 has an fp32 scale beside it."""
    return head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)


class StepCache:
    """Keys and values of every layer in pages; 16 slots are a tile, so the pool is padded to whole tiles.

    fp32, fp16, fp8 (e4m3, saturating at 448) or int8. int8 has a scale for each token and head, its largest magnitude / 127: every number is then within
    half a scale of what was stored, and attention adds 2^-15 to that (`cpu/attention_int8.h`). `bounds` keeps those of each
    tile's keys beside it, for queries that select pages; blocks must then be whole tiles.
    """

    def __init__(
        self,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        *,
        bounds: bool = False,
    ) -> None:
        if bounds and block_size % PAGE:
            raise InputError(
                f"a KV block of {block_size} tokens is not whole pages of {PAGE}", f"use a multiple of {PAGE}", field="block_size"
            )
        if dtype not in CACHE_DTYPES:
            raise InputError(f"the native cache holds float32, float16, int8 or float8_e4m3fn, not {dtype}", "choose one of the four")
        slots = -(-blocks * block_size // 16) * 16
        self.block_size, self.dtype, self.blocks = block_size, dtype, blocks
        self.kv_heads, self.head_dim = kv_heads, head_dim
        # Zeroes, which the system gives page by page as the pool is first written: lanes of a tile that no token has
        # written yet are multiplied by weight 0, and 0 x NaN would be NaN.
        arena, rows = Arena(), layers * slots * kv_heads
        self.keys, self.values = (arena.take(rows * head_dim * dtype.itemsize).view(dtype).view(layers, -1) for _ in range(2))
        scales = rows if dtype == torch.int8 else 0
        self.key_scales, self.value_scales = (
            arena.take(4 * scales).view(torch.float32).view(layers, -1) if scales else None for _ in range(2)
        )
        pages = rows // PAGE
        self.bounds = arena.take(pages * 2 * head_dim).view(torch.int8).view(layers, -1) if bounds else None
        self.bound_scales = arena.take(4 * pages).view(torch.float32).view(layers, -1) if bounds else None

    @property
    def nbytes(self) -> int:
        rows = self.keys.numel() // self.head_dim
        bounds = 0 if self.bounds is None else rows // PAGE * page_bound_bytes(self.head_dim)
        return 2 * rows * cache_row_bytes(self.head_dim, self.dtype) + bounds

    def bound_pages(self, layer: int, first_slot: int, slots: int) -> None:
        """Makes the bounds of pages whose keys came otherwise than by a batch: `slots` slots from `first_slot`, a page's first."""
        require().arm_bound_pages(ctypes.byref(self.struct(layer)), first_slot // PAGE, slots)

    @property
    def contents(self) -> CacheBlocks:
        """The blocks as bytes."""
        heads, dim = self.kv_heads, self.head_dim
        scales = [tensor for tensor in (self.key_scales, self.value_scales) if tensor is not None]
        if self.block_size % 16 == 0:  # whole tiles, one after another
            rows = [Part(layer.view(self.blocks, -1)) for tensor in (self.keys, self.values, *scales) for layer in tensor]
            bounds = [tensor for tensor in (self.bounds, self.bound_scales) if tensor is not None]
            rows += [Part(layer.view(heads, self.blocks, -1).transpose(0, 1)) for tensor in bounds for layer in tensor]
            return CacheBlocks(rows, self.blocks, 1)
        parts: list[Part] = []
        for keys, values in zip(self.keys, self.values, strict=True):
            if self.dtype == torch.int8:
                parts.append(Part(keys.view(-1, heads, dim // 4, 16, 4).permute(0, 3, 1, 2, 4), (16,)))
                parts.append(Part(values.view(-1, heads, 4, dim, 4).permute(0, 2, 4, 1, 3), (4, 4)))
            else:
                parts.append(Part(keys.view(-1, heads, dim, 16).permute(0, 3, 1, 2), (16,)))
                parts.append(Part(values.view(-1, heads, 16, dim).permute(0, 2, 1, 3), (16,)))
        parts += [Part(layer.view(-1, heads, 16).permute(0, 2, 1), (16,)) for tensor in scales for layer in tensor]
        return CacheBlocks(parts, self.blocks, self.block_size)

    def struct(self, layer: int) -> CCache:
        return CCache(
            self.keys[layer].data_ptr(),
            self.values[layer].data_ptr(),
            *(
                None if tensor is None else tensor[layer].data_ptr()
                for tensor in (self.key_scales, self.value_scales, self.bounds, self.bound_scales)
            ),
            self.keys.shape[1] // (PAGE * self.kv_heads * self.head_dim),
            CACHE_DTYPES.index(self.dtype),
            self.kv_heads,
            self.head_dim,
            self.block_size,
        )


def attention(
    cache: StepCache,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: int,
    table: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    seen: Seen = Seen(),  # noqa: B008
    read: Tensor | None = None,
) -> Tensor:
    """Store k, v [T, Hkv, D] of one sequence at positions start.. of layer 0 of `cache`, attend with q [T, Hq, D]; one thread.

    The kernel of `DecoderStep` on its own, for tests and benchmarks. `table`: int32 block table. Where `seen` has `pages`,
    every query reads at most so many; `read`, int32 [T, Hkv, pages], is given the tiles of the pool that they are.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out = torch.empty_like(q)
    sequence = CSequence(table.data_ptr(), start, q.shape[0], 0, 0, 0)
    require().arm_attention(
        ctypes.byref(cache.struct(0)),
        ctypes.byref(sequence),
        q.shape[1],
        ctypes.c_float(scale),
        ctypes.c_float(softcap or 0.0),
        window or 0,
        (ctypes.c_int32 * 3)(seen.pages, seen.first_pages, seen.last_pages) if seen.pages else None,
        *(ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out)),
        None if read is None else ctypes.c_void_p(read.data_ptr()),
    )
    return out


class DecoderStep:
    """Runs batches through a packed decoder with `threads` threads of its own (they sleep between calls). One caller at a time."""

    def __init__(self, model: StepModel, cache: StepCache, threads: int, deterministic: bool = False, seen: Seen = Seen()) -> None:  # noqa: B008
        if model.head_dim % 16 or model.head_dim > MAX_HEAD_DIM:
            raise InputError(
                f"head_dim is {model.head_dim}; the native kernels take multiples of 16 up to {MAX_HEAD_DIM}", "serve with --backend torch"
            )
        if threads < 1:
            raise InputError(f"threads is {threads}", "give at least 1")
        if seen.pages and cache.bounds is None:
            raise InputError("queries select pages by bounds that this cache does not keep", "make the StepCache with bounds=True")
        self._lib = require()
        self.model, self.cache, self.threads, self.seen = model, cache, threads, seen
        self._keep: list[Tensor] = []

        def pointer(t: Tensor | None) -> int | None:
            if t is None:
                return None
            t = t.detach().to(torch.float32).contiguous()
            self._keep.append(t)
            return t.data_ptr()

        self._layers = (CLayer * len(model.layers))(
            *(
                CLayer(
                    layer.qkv.struct(),
                    layer.o.struct(),
                    layer.gate_up.struct(),
                    layer.down.struct(),
                    *(
                        pointer(t)
                        for t in (
                            layer.attention_norm,
                            layer.mlp_norm,
                            layer.post_attention_norm,
                            layer.post_mlp_norm,
                            layer.q_norm,
                            layer.k_norm,
                        )
                    ),
                    cache.struct(index),
                    layer.window or 0,
                    layer.rope,
                )
                for index, layer in enumerate(model.layers)
            )
        )
        embedding = model.embedding.detach().contiguous()
        if embedding.dtype != torch.float16:
            embedding = embedding.to(torch.float32)
        self._keep.append(embedding)
        self._model = CModel(
            len(model.layers),
            model.hidden,
            model.intermediate,
            model.heads,
            model.kv_heads,
            model.head_dim,
            model.vocabulary,
            ACTIVATIONS.index(model.activation),
            model.norm_eps,
            model.attention_scale,
            model.attention_softcap or 0.0,
            model.logit_softcap or 0.0,
            model.embedding_scale,
            int(embedding.dtype == torch.float16),
            int(deterministic),
            seen.pages,
            seen.first_pages,
            seen.last_pages,
            seen.dense_layers,
            seen.sinks,
            seen.rolling,
            embedding.data_ptr(),
            pointer(model.final_norm),
            self._layers,
            model.head.struct(),
            (ctypes.c_void_p * 2)(*(pointer(frequencies) for frequencies, _ in model.ropes)),
            (ctypes.c_float * 2)(*(scaling for _, scaling in model.ropes)),
        )
        self._logits = torch.empty(0, model.vocabulary)
        self._busy = threading.Lock()
        self._handle = self._lib.arm_engine_create(threads)
        if not self._handle:
            raise CapacityError(f"the system does not give {threads:,} threads", "ask for as many as there are cores", field="threads")

    def __del__(self) -> None:
        if getattr(self, "_handle", None):
            self._lib.arm_engine_destroy(self._handle)
            self._handle = None

    def phases(self) -> dict[str, int]:
        """Nanoseconds that each phase of all iterations so far took, on the calling thread and with the wait at its end.

        "prepare" is norms and the quantisation of activations, "embed" the start of an iteration, "select" the choice of pages,
        the rest its products, rotary embedding (with the writing of keys and values) and attention.
        """
        found = (ctypes.c_int64 * len(PHASES))()
        self._lib.arm_engine_phases(self._handle, found)
        return dict(zip(PHASES, found, strict=True))

    def pack_adapter(self, layers: Sequence[Layer]) -> PackedLowRank:
        """An adapter laid out for `forward`. Raises InputError for one of another model."""
        model = self.model
        q, kv = model.heads * model.head_dim, model.kv_heads * model.head_dim
        hidden, inner = model.hidden, model.intermediate
        shapes = [(q, hidden), (kv, hidden), (kv, hidden), (hidden, q), (inner, hidden), (inner, hidden), (hidden, inner)]
        return PackedLowRank(layers, shapes, len(model.layers))

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        starts: Sequence[int],
        counts: Sequence[int],
        tables: Sequence[Tensor],
        rows: Tensor,
        adapters: Sequence[PackedLowRank | None] = (),
        selects: Sequence[int] | None = None,
        hidden: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute a flat batch; logits of `rows` (fp32 [len(rows), vocabulary]), each row's peak (NaN if any is NaN) and its token.

        tokens, positions: int32 [tokens]; sequence i owns the next `counts[i]` rows, its first at position `starts[i]`, and
        `tables[i]` (int32) holds its block table; rows: int32 indices into the batch. `adapters[i]`, from `pack_adapter`, is
        sequence i's; sequences without one compute as if nobody had any, to the bit.
        Where queries select pages, those of sequence i do so from position `selects[i]` on (default: all of them). Where they
        see a rolling window, `Seen.droppable(starts[i])` blocks are missing from `tables[i]` after those of the sinks.
        `hidden` (fp32 [len(rows), hidden]) gets the final norm's output of `rows`.
        The logits are a view of a buffer that the next call overwrites. Raises InputError for an index out of its range,
        which the kernel would follow into memory that is not its own, and ArmillaryError while another thread is inside.
        """
        _check("token", tokens, self.model.vocabulary)
        _check("row", rows, tokens.shape[0])
        _check("KV block", torch.cat(list(tables)) if tables else rows[:0], self.cache.blocks)
        sequences = (CSequence * len(starts))()
        row = 0
        for i, (start, count, table) in enumerate(zip(starts, counts, tables, strict=True)):
            missing = self.seen.droppable(start, self.cache.block_size) if start > 0 else 0
            if start < 0 or count < 1 or start + count > (table.shape[0] + missing) * self.cache.block_size:
                raise InputError(
                    f"{count} tokens from position {start} do not fit a table of {table.shape[0]} KV blocks of {self.cache.block_size}"
                )
            sequences[i] = CSequence(table.data_ptr(), start, count, row, selects[i] if selects is not None else 0, missing)
            row += count
        if row != tokens.shape[0] or row != positions.shape[0]:
            raise InputError(f"the sequences have {row} tokens, the batch {tokens.shape[0]} and {positions.shape[0]} positions")
        if any(adapters) and len(adapters) != len(starts):
            raise InputError(f"{len(adapters)} adapters for {len(starts)} sequences", "give one each, or None")
        if not self._busy.acquire(blocking=False):
            raise ArmillaryError("this DecoderStep is computing another thread's batch", "give each thread a DecoderStep of its own")
        try:
            found = self._forward(tokens, positions, sequences, rows, adapters, hidden)
        finally:
            self._busy.release()
        if hidden is not None:
            hidden.mul_(hidden.square().mean(-1, keepdim=True).add_(self.model.norm_eps).rsqrt_()).mul_(self.model.final_norm)
        return found

    def _forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        sequences: ctypes.Array[CSequence],
        rows: Tensor,
        adapters: Sequence[PackedLowRank | None],
        hidden: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if hidden is not None and (hidden.shape != (rows.shape[0], self.model.hidden) or not hidden.is_contiguous()):
            raise InputError(f"hidden states of {rows.shape[0]} rows do not fit {list(hidden.shape)}", "give [rows, hidden]")
        if rows.shape[0] > self._logits.shape[0]:
            self._logits = torch.empty(rows.shape[0], self.model.vocabulary)
        logits, peak, best = self._logits[: rows.shape[0]], torch.empty(rows.shape[0]), torch.empty(rows.shape[0], dtype=torch.int32)
        distinct = list(dict.fromkeys(adapter for adapter in adapters if adapter is not None))
        index = {adapter: number for number, adapter in enumerate(distinct)}
        addresses = (ctypes.c_void_p * len(distinct))(*(adapter.address for adapter in distinct))
        adapter_of = (ctypes.c_int32 * len(adapters))(*(-1 if adapter is None else index[adapter] for adapter in adapters))
        batch = CBatch(
            tokens.shape[0],
            len(sequences),
            rows.shape[0],
            len(distinct),
            tokens.data_ptr(),
            positions.data_ptr(),
            ctypes.addressof(sequences),
            rows.data_ptr(),
            logits.data_ptr(),
            peak.data_ptr(),
            best.data_ptr(),
            ctypes.addressof(addresses),
            ctypes.addressof(adapter_of),
            hidden.data_ptr() if hidden is not None else None,
        )
        if not self._lib.arm_forward(self._handle, ctypes.byref(self._model), ctypes.byref(batch)):
            raise CapacityError(f"no memory for the buffers of a batch of {tokens.shape[0]:,} tokens", "lower max_batch_tokens")
        return logits, peak, best


def _check(what: str, indices: Tensor, bound: int) -> None:
    """Raises InputError for an index outside [0, bound)."""
    if indices.numel():
        low, high = (int(end) for end in indices.aminmax())
        if low < 0 or high >= bound:
            raise InputError(f"{what} {low if low < 0 else high} is outside 0 .. {bound - 1}")
