"""From named tensors to a decoder and back: names follow Hugging Face, every mismatch is named."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from armillary.core.errors import FormatError
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder


def hf_parameters(decoder: Decoder) -> dict[str, nn.Parameter]:
    """Every parameter under its Hugging Face name; a tied head appears once, as `model.embed_tokens.weight`."""
    return {hf_name(name): parameter for name, parameter in decoder.named_parameters()}


def hf_name(name: str) -> str:
    """`layers.0.self_attn.qkv.q_proj.weight` -> `model.layers.0.self_attn.q_proj.weight`."""
    name = name.replace(".qkv.", ".").replace(".gate_up.", ".")
    return name if name.startswith("lm_head.") else f"model.{name}"


def assemble(config: ModelConfig, names: Collection[str], read: Callable[[str], Tensor], dtype: torch.dtype | None = None) -> Decoder:
    """A decoder whose parameters are `read(hf_name)`, cast to `dtype` (None: as read; no copy when it is the same).

    Raises FormatError when `names` lacks a tensor, has one that the model has no place for, or a shape is wrong.
    """
    decoder = skeleton(config)
    wanted = hf_parameters(decoder)
    if missing := [name for name in wanted if name not in names]:
        raise FormatError(
            f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)", "the file is not a whole model of this config"
        )
    if unexpected := [name for name in names if name not in wanted and not _redundant(config, name)]:
        raise FormatError(
            f"tensor {unexpected[0]} has no place in a {config.architecture} of {config.num_layers} layers ({len(unexpected)} such)",
            "the weights and the config do not belong together, or the model has parts that this family lacks",
        )
    modules = dict(decoder.named_modules())
    for ours, parameter in list(decoder.named_parameters()):
        name = hf_name(ours)
        tensor = read(name)
        if tensor.shape != parameter.shape:
            raise FormatError(
                f"tensor {name} has shape {list(tensor.shape)}, the config says {list(parameter.shape)}",
                "check that weights and config belong together",
            )
        if not tensor.is_floating_point():
            raise FormatError(f"tensor {name} is {tensor.dtype}, not floating point", "quantised weights come from GGUF files")
        owner, _, leaf = ours.rpartition(".")
        setattr(modules[owner], leaf, nn.Parameter(tensor if dtype is None else tensor.to(dtype)))
    decoder.tie()
    if config.tie_embeddings and "lm_head.weight" in names:
        head, embedding = read("lm_head.weight"), read("model.embed_tokens.weight")
        if head.shape != embedding.shape or not torch.equal(head, embedding):
            raise FormatError(
                "lm_head.weight differs from model.embed_tokens.weight", "the config says they are tied: set tie_word_embeddings to false"
            )
    return decoder


def skeleton(config: ModelConfig) -> Decoder:
    """A decoder without memory: every parameter is on the meta device."""
    with torch.device("meta"), NoInit():
        return Decoder(config)


class NoInit(TorchFunctionMode):
    """Leaves parameters uninitialised: on the meta device a random fill does nothing, yet its first call imports the compiler (1 s)."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return (kwargs or {}).get("tensor", args[0] if args else None)
        return function(*args, **(kwargs or {}))


def _redundant(config: ModelConfig, name: str) -> bool:
    """Tensors that some writers add and no decoder needs: rotary buffers of old Llama 2 files, a tied head's copy."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
