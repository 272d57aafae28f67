"""What an encoder's folder says of it, read without its weights and without torch: BERT, with sentence-transformers' files beside it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from armillary.core.errors import FormatError, InputError
from armillary.models.config_file import MAX_CONFIG_BYTES
from armillary.models.fields import Fields, read_json

Pooling = Literal["mean", "cls"]
_POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


@dataclass(frozen=True, slots=True)
class EncoderConfig:
    """A BERT (Devlin et al. 2018) and how its hidden states become one vector (Reimers & Gurevych 2019).

    `max_tokens` is the length that the embedding was made for, at most `positions`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    positions: int
    token_types: int
    norm_eps: float
    max_tokens: int
    pooling: Pooling = "mean"
    normalize: bool = True

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def parameters(self) -> int:
        """How many numbers are in its weights, without the pooler's, which embeddings do not use."""
        d, wide = self.hidden_size, self.intermediate_size
        layer = 4 * (d * d + d) + 2 * d * wide + d + wide + 4 * d
        return (self.vocab_size + self.positions + self.token_types) * d + 2 * d + self.num_layers * layer


def is_encoder(path: Path) -> bool:
    """Whether a model's path is the folder of an encoder."""
    return (path / "config.json").is_file() and read_json(path / "config.json", MAX_CONFIG_BYTES).get("model_type") == "bert"


def read_encoder_config(folder: Path) -> EncoderConfig:
    """Raises InputError for what this encoder does not carry out (relative positions, other activations and poolings), FormatError for a bad value."""
    fields = Fields(read_json(folder / "config.json", MAX_CONFIG_BYTES), "config.json")
    for name, carried_out, default in (
        ("model_type", "bert", ""),
        ("hidden_act", "gelu", "gelu"),
        ("position_embedding_type", "absolute", "absolute"),
    ):
        if (value := fields.string(name, default)) != carried_out:
            raise InputError(
                f"config.json: {name} is {value[:40]!r}; encoders here have {carried_out!r}", "choose another model", field=name
            )
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads", high=1024)
    if hidden % heads:
        raise FormatError(f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads}", "fetch the file again")
    positions = fields.integer("max_position_embeddings")
    pooling, normalize = _pooling(folder)
    return EncoderConfig(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=fields.integer("num_hidden_layers", high=1024),
        num_heads=heads,
        positions=positions,
        token_types=fields.integer("type_vocab_size", 2),
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        max_tokens=min(positions, _stated_length(folder) or positions),
        pooling=pooling,
        normalize=normalize,
    )


def _stated_length(folder: Path) -> int | None:
    file = folder / "sentence_bert_config.json"
    return Fields(read_json(file, MAX_CONFIG_BYTES), file.name).optional_integer("max_seq_length") if file.is_file() else None


def _pooling(folder: Path) -> tuple[Pooling, bool]:
    """As sentence-transformers' modules.json says; without it the mean, normalised, as most embedding models have it."""
    file = folder / "modules.json"
    if not file.is_file():
        return "mean", True
    try:
        kinds: list[Any] = [str(module["type"]).rpartition(".")[2] for module in json.loads(file.read_bytes()[:MAX_CONFIG_BYTES])]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise FormatError(f"modules.json is not a list of modules ({str(error)[:80]})", "fetch the file again") from error
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"modules.json asks for {', '.join(kinds)[:120]}; here a Transformer, Pooling and Normalize are carried out",
            "choose another model",
        )
    fields = Fields(read_json(folder / "1_Pooling" / "config.json", MAX_CONFIG_BYTES), "1_Pooling/config.json")
    asked = [name for name, value in fields.raw.items() if name.startswith("pooling_mode_") and value is True]
    if len(asked) != 1 or asked[0] not in _POOLING:
        raise InputError(
            f"1_Pooling/config.json asks for {', '.join(asked) or 'no pooling'}; one of {', '.join(_POOLING)} is carried out",
            "choose another model",
        )
    return ("mean" if asked[0] == "pooling_mode_mean_tokens" else "cls"), kinds[-1] == "Normalize"
