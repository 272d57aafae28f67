"""The forward pass as one call into the CPU kernels (`kernels.cpu_step`): no Python between layers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.cpu_library import MAX_HEAD_DIM, available
from armillary.kernels.cpu_step import DecoderStep, StepCache
from armillary.kernels.low_rank import Layer, PackedLowRank
from armillary.kernels.seen import Seen
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.stored import DecoderWeights, Weights
from armillary.serve.executors.forward import FlatBatch, Logits
from armillary.serve.executors.packed_model import Quantisation
from armillary.serve.executors.weight_cache import prepare


class NativeForward:
    """`Forward` in C++: packed weights, a pool of its own layout, `threads` threads that sleep between iterations.

    Results do not depend on the number of threads, and with `deterministic` not on what else is in the batch either; only int4
    takes that liberty (see `kernels/cpu/wide.h`), the others are so at no cost. `quantisation`: "none" is fp32 weights
    and exact arithmetic; "fp16" stores weights in half precision; "int8" and "int4" multiply in integers. `seen` bounds what
    queries read; a span's table then lacks the blocks that none of its queries sees (`Seen.droppable` of its start).
    `release` says that nobody else needs the weights of `source` any more: a decoder's linear layers are emptied as they are
    packed. `keep` as in `weight_cache.prepare`.
    Raises InputError where the kernels cannot run (`unsupported` says why), and for weights that the format cannot hold.
    """

    own_threads = True

    def __init__(
        self,
        source: Decoder | Weights,
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        quantisation: Quantisation = "none",
        kv_dtype: torch.dtype = torch.float32,
        deterministic: bool = False,
        seen: Seen = Seen(),  # noqa: B008
        release: bool = False,
        keep: bool = False,
    ) -> None:
        weights = DecoderWeights(source) if isinstance(source, Decoder) else source
        config = weights.config
        if (why := unsupported(config)) is not None:
            raise InputError(why, "serve with --backend torch", field="backend")
        self.name = f"native ({quantisation if quantisation != 'none' else 'fp32'})"
        found = prepare(weights, quantisation, release=release, keep=keep)
        model, self.prepared, self.keeping = found.model, found.words, found.keeping
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        self.cache = StepCache(*shape, kv_dtype, bounds=seen.pages > 0)
        self.step = DecoderStep(model, self.cache, threads, deterministic, seen)
        self._deterministic = deterministic
        self.weight_bytes = model.nbytes + model.embedding.nbytes
        self.cache_bytes = self.cache.nbytes

    def logits(self, batch: FlatBatch) -> Logits:
        spans = batch.spans
        hidden = torch.empty(len(batch.rows), self.step.model.hidden) if batch.hidden and batch.rows else None
        found = self.step.forward(
            _int32(batch.tokens),
            _int32(batch.positions),
            [span.start for span in spans],
            [span.count for span in spans],
            [_int32(span.blocks) for span in spans],
            _int32(batch.rows),
            batch.adapters,  # type: ignore[arg-type]  # made by pack_adapter
            [span.prompt for span in spans],
            hidden,
        )
        return Logits(*found, hidden)

    def pack_adapter(self, layers: Sequence[Layer]) -> PackedLowRank:
        return self.step.pack_adapter(layers)

    def with_layers(self, kept: Sequence[int]) -> NativeForward:
        model, cache = self.step.model, self.cache
        model = replace(model, layers=tuple(model.layers[layer] for layer in kept))
        other = copy.copy(self)
        other.name = f"{self.name}, {len(kept)} layers"
        shape = (len(kept), cache.blocks, cache.block_size, cache.kv_heads, cache.head_dim)
        other.cache = StepCache(*shape, cache.dtype, bounds=cache.bounds is not None)
        other.step = DecoderStep(model, other.cache, self.step.threads, self._deterministic, self.step.seen)
        other.weight_bytes, other.cache_bytes = 0, other.cache.nbytes
        return other

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        self.cache.contents.copy(copies)

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        return self.cache.contents.read(blocks)

    def write_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        self.cache.contents.write(blocks, data)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int32))


def unsupported(config: ModelConfig) -> str | None:
    """Why the native kernels cannot run this model here, or None when they can."""
    if not available():
        return "the native kernels are not built (no compiler, or ARMILLARY_NATIVE=0)"
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    return None
