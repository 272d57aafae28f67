"""The forward pass as one call into the CPU kernels (`kernels.cpu_step`): no Python between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from armillary.core.errors import InputError
from armillary.kernels.cpu_library import MAX_HEAD_DIM, available
from armillary.kernels.cpu_step import DecoderStep, StepCache, StepLayer, StepModel
from armillary.kernels.norm import RMSNorm
from armillary.kernels.packed_weight import Arena, Format, PackedWeight
from armillary.models.config import ModelConfig
from armillary.models.decoder import Block, Decoder
from armillary.models.rope import Rope, inverse_frequencies
from armillary.serve.executors.forward import FlatBatch, Logits

Quantisation = Literal["none", "fp16", "int8", "int4"]
_FORMATS: dict[Quantisation, Format] = {"none": "fp32", "fp16": "fp16", "int8": "int8", "int4": "int4m"}


class NativeForward:
    """`Forward` in C++: packed weights, a pool of its own layout, `threads` threads that sleep between iterations.

    Results do not depend on the number of threads nor on what else is in the batch. `quantisation`: "none" is fp32 weights
    and exact arithmetic; "fp16" stores weights in half precision; "int8" and "int4" multiply in integers. `release` as in
    `step_model`. Raises InputError where the kernels cannot run (`unsupported` says why).
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_blocks: int,
        block_size: int,
        threads: int,
        quantisation: Quantisation = "none",
        kv_dtype: torch.dtype = torch.float32,
        release: bool = False,
    ) -> None:
        config = decoder.config
        if (why := unsupported(config)) is not None:
            raise InputError(why, "serve with --backend torch", field="backend")
        self.name = f"native ({quantisation if quantisation != 'none' else 'fp32'})"
        model = step_model(decoder, quantisation, release=release)
        self.cache = StepCache(config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim, kv_dtype)
        self.step = DecoderStep(model, self.cache, threads)
        self.weight_bytes = model.nbytes + model.embedding.nbytes
        self.cache_bytes = self.cache.nbytes

    def logits(self, batch: FlatBatch) -> Logits:
        spans = batch.spans
        found = self.step.forward(
            _int32(batch.tokens),
            _int32(batch.positions),
            [span.start for span in spans],
            [span.count for span in spans],
            [_int32(span.blocks) for span in spans],
            _int32(batch.rows),
        )
        return Logits(*found)


def _int32(values: Sequence[int]) -> Tensor:
    return torch.from_numpy(np.array(values, np.int32))


def unsupported(config: ModelConfig) -> str | None:
    """Why the native kernels cannot run this model here, or None when they can."""
    if not available():
        return "the native kernels are not built (no compiler, or ARMILLARY_NATIVE=0)"
    if config.head_dim % 16 or config.head_dim > MAX_HEAD_DIM:
        return f"head_dim {config.head_dim} is not a multiple of 16 up to {MAX_HEAD_DIM}"
    return None


def step_model(decoder: Decoder, quantisation: Quantisation = "none", *, release: bool = False) -> StepModel:
    """A decoder's weights laid out for the kernels.

    The decoder keeps its own, unless `release` says that nobody needs them any more: its linear layers are then emptied as
    they are packed, and it computes no longer.
    """
    config = decoder.config
    format = _FORMATS[quantisation]
    arena = Arena()

    def norm(module: RMSNorm) -> Tensor:
        return module.weight.detach().float() + config.norm_offset

    def pack(*linears: nn.Module, interleave: bool = False) -> PackedWeight:
        parts = [linear for linear in linears if isinstance(linear, nn.Linear)]
        assert len(parts) == len(linears)
        packed = PackedWeight([part.weight for part in parts], format, [part.bias for part in parts], interleave=interleave, arena=arena)
        if release:
            for part in parts:
                part.weight = nn.Parameter(torch.empty(0), requires_grad=False)
        return packed

    layers = []
    for index, block in enumerate(decoder.layers):
        assert isinstance(block, Block)
        attention, mlp = block.self_attn, block.mlp
        qkv, gate_up = attention.qkv.get_submodule, mlp.gate_up.get_submodule
        layers.append(
            StepLayer(
                qkv=pack(qkv("q_proj"), qkv("k_proj"), qkv("v_proj")),
                o=pack(attention.o_proj),
                gate_up=pack(gate_up("gate_proj"), gate_up("up_proj"), interleave=True),
                down=pack(mlp.down_proj),
                attention_norm=norm(block.input_layernorm),
                mlp_norm=norm(block.pre_feedforward_layernorm if config.sandwich_norms else block.post_attention_layernorm),
                post_attention_norm=norm(block.post_attention_layernorm) if config.sandwich_norms else None,
                post_mlp_norm=norm(block.post_feedforward_layernorm) if config.sandwich_norms else None,
                q_norm=norm(attention.q_norm) if attention.q_norm is not None else None,
                k_norm=norm(attention.k_norm) if attention.k_norm is not None else None,
                window=config.window(index),
                rope=int(decoder.local_rope is not None and config.window(index) is not None),
            )
        )

    def rope(rope: Rope) -> tuple[Tensor, float]:
        return inverse_frequencies(rope.config, rope.head_dim), rope.scaling

    return StepModel(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocabulary=config.vocab_size,
        activation=config.activation,
        norm_eps=config.norm_eps,
        attention_scale=config.scale,
        attention_softcap=config.attention_softcap,
        logit_softcap=config.logit_softcap,
        embedding_scale=config.embedding_scale,
        embedding=decoder.embed_tokens.weight.detach(),
        final_norm=norm(decoder.norm),
        layers=tuple(layers),
        head=pack(decoder.lm_head),
        ropes=(rope(decoder.rope), *([rope(decoder.local_rope)] if decoder.local_rope else [])),
    )
