"""A model's weights laid out for the CPU kernels: which format each product takes, and where its numbers come from."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor

from armillary.core.errors import FormatError, InputError
from armillary.kernels.cpu_step import StepLayer, StepModel
from armillary.kernels.packed_weight import Arena, Blocks, Format, PackedWeight, takes_straight
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.rope import attention_scaling, inverse_frequencies
from armillary.models.stored import Weights

Quantisation = Literal["none", "fp16", "int8", "int4"]
_EMBEDDING = "model.embed_tokens.weight"
_FOUR_BITS = {"Q4_0", "Q4_1", "Q4_K"}
Part = Literal["qkv", "o", "gate_up", "down", "head", "embedding"]


def format_of(part: Part, stored: Collection[str], quantisation: Quantisation) -> Format:
    """The format of a part of the model, `stored` being the types of its matrices in the file. The embedding's is fp32 or fp16.

    The head of an int4 model is int8 unless the file has it in 4 bits: at 4 bits it made nine tenths of SmolLM2's loss
    (bench/results/perplexity.md), and llama.cpp keeps it larger too.
    """
    if part == "embedding":
        return "fp32"
    if quantisation == "int4" and part == "head" and not set(stored) <= _FOUR_BITS:
        return "int8"
    if quantisation == "int4":
        return "int4" if set(stored) == {"Q4_0"} else "int4m"
    plain: dict[Quantisation, Format] = {"none": "fp32", "fp16": "fp16", "int8": "int8"}
    return plain[quantisation]


@dataclass(frozen=True)
class Made:
    """Everything that was laid out for a model: arrays by name, and the format and shape [n, k] of each product."""

    arrays: dict[str, Tensor] = field(default_factory=dict)
    formats: dict[str, tuple[Format, tuple[int, int]]] = field(default_factory=dict)


class Parts(Protocol):
    """Where `step_model` takes packed weights and vectors from, by their names in the model."""

    def product(self, part: Part, names: Sequence[str], *, interleave: bool = False) -> PackedWeight: ...

    def embedding(self) -> Tensor: ...

    def vector(self, name: str) -> Tensor: ...


class LaidOut:
    """`Parts` made from a model's weights now. GGUF blocks that a format takes straight never become floats.

    `release`: each matrix is given up as soon as it is packed. `made` keeps what was made, for `Kept`.
    """

    def __init__(self, weights: Weights, quantisation: Quantisation, *, release: bool = False) -> None:
        self._weights, self._quantisation, self._release = weights, quantisation, release
        self._arena = Arena()
        self.made = Made()

    def product(self, part: Part, names: Sequence[str], *, interleave: bool = False) -> PackedWeight:
        weights, config = self._weights, self._weights.config
        tied = {"lm_head.weight": _EMBEDDING} if config.tie_embeddings else {}
        stored = [tied.get(f"{name}.weight", f"{name}.weight") for name in names]
        format = format_of(part, [weights.kind(name) for name in stored], self._quantisation)
        biased = {"qkv": config.qkv_bias, "o": config.o_bias, "gate_up": config.mlp_bias, "down": config.mlp_bias}.get(part, False)
        biases = [weights.tensor(f"{name}.bias") if biased else None for name in names]
        try:
            packed = PackedWeight([self._matrix(name, format) for name in stored], format, biases, interleave=interleave, arena=self._arena)
        except InputError as error:
            raise FormatError(f"{', '.join(stored)}: {error.problem}", error.fix) from error
        if self._release:
            for name in names:
                weights.release(f"{name}.weight")
        self.made.formats[names[0]] = format, packed.shape
        self.made.arrays.update({f"{names[0]}:{array}": tensor for array, tensor in packed.arrays().items()})
        return packed

    def _matrix(self, name: str, format: Format) -> Tensor | Blocks:
        blocks = self._weights.blocks(name) if takes_straight(self._weights.kind(name), format) else None
        if blocks is not None:
            return blocks
        made = self.made.arrays.get(name)  # a tied head is the embedding, whose floats may be there already
        return made if made is not None and made.dtype == torch.float32 else self._weights.tensor(name)

    def embedding(self) -> Tensor:
        format = format_of("embedding", [self._weights.kind(_EMBEDDING)], self._quantisation)
        table = self._weights.tensor(_EMBEDDING).to(torch.float16 if format == "fp16" else torch.float32).contiguous()
        self.made.arrays[_EMBEDDING] = table
        return table

    def vector(self, name: str) -> Tensor:
        vector = self._weights.tensor(name).float()
        if not torch.isfinite(vector).all():
            raise FormatError(f"{name} has NaN or infinite values", "check the model file")
        self.made.arrays[name] = vector
        return vector


class Kept:
    """`Parts` as a `LaidOut` for the same model once made them. Raises FormatError where one is missing or of another size."""

    def __init__(self, made: Made) -> None:
        self._made = made

    def product(self, part: Part, names: Sequence[str], *, interleave: bool = False) -> PackedWeight:
        key = names[0]
        if key not in self._made.formats:
            raise FormatError(f"{key} is missing", "lay the weights out again")
        format, shape = self._made.formats[key]
        found = (f"{key}:{array}" for array in PackedWeight.ARRAYS)
        return PackedWeight.restore(
            format, shape, {name.rpartition(":")[2]: self._array(name) for name in found if name in self._made.arrays}
        )

    def embedding(self) -> Tensor:
        return self._array(_EMBEDDING)

    def vector(self, name: str) -> Tensor:
        return self._array(name)

    def _array(self, name: str) -> Tensor:
        if name not in self._made.arrays:
            raise FormatError(f"{name} is missing", "lay the weights out again")
        return self._made.arrays[name]


def step_model(config: ModelConfig, parts: Parts) -> StepModel:
    """The whole decoder for the kernels."""

    def norm(name: str) -> Tensor:
        return parts.vector(f"model.{name}.weight") + config.norm_offset

    layers = []
    for index in range(config.num_layers):
        at, sandwich = f"layers.{index}", config.sandwich_norms
        attention, mlp = f"model.{at}.self_attn", f"model.{at}.mlp"
        layers.append(
            StepLayer(
                qkv=parts.product("qkv", [f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"]),
                o=parts.product("o", [f"{attention}.o_proj"]),
                gate_up=parts.product("gate_up", [f"{mlp}.gate_proj", f"{mlp}.up_proj"], interleave=True),
                down=parts.product("down", [f"{mlp}.down_proj"]),
                attention_norm=norm(f"{at}.input_layernorm"),
                mlp_norm=norm(f"{at}.{'pre_feedforward_layernorm' if sandwich else 'post_attention_layernorm'}"),
                post_attention_norm=norm(f"{at}.post_attention_layernorm") if sandwich else None,
                post_mlp_norm=norm(f"{at}.post_feedforward_layernorm") if sandwich else None,
                q_norm=norm(f"{at}.self_attn.q_norm") if config.qk_norm else None,
                k_norm=norm(f"{at}.self_attn.k_norm") if config.qk_norm else None,
                window=config.window(index),
                rope=int(config.local_rope is not None and config.window(index) is not None),
            )
        )

    def rope(rope: RopeConfig) -> tuple[Tensor, float]:
        return inverse_frequencies(rope, config.head_dim), attention_scaling(rope)

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
        embedding=parts.embedding(),
        final_norm=norm("norm"),
        layers=tuple(layers),
        head=parts.product("head", ["lm_head"]),
        ropes=(rope(config.rope), *([rope(config.local_rope)] if config.local_rope else [])),
    )
