"""A small BERT for embeddings: whole batches as one row of tokens without padding, each sequence attending to itself.

ByteTransformer (Zhai et al. 2023): all linear layers, norms and activations run on [tokens, hidden], so a batch of unequal
lengths costs what its tokens cost; only attention goes sequence by sequence, here run by run of equal lengths.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn
from torch.nn import functional

from armillary.core.errors import FormatError
from armillary.core.units import format_bytes
from armillary.kernels.linear import FusedLinear, Linear
from armillary.kernels.packed_linear import pack
from armillary.models import hub
from armillary.models.encoder_config import EncoderConfig, read_encoder_config
from armillary.models.fields import read_json
from armillary.models.hf import opened_tensors
from armillary.models.tokenizer import MAX_JSON_BYTES
from armillary.models.weights import NoInit

Runs = Sequence[tuple[int, int]]  # (sequences, tokens of each): neighbours of equal length


class EncoderLayer(nn.Module):
    """Post-norm attention and MLP, as in BERT."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        d = config.hidden_size
        self.heads = config.num_heads
        self.qkv = FusedLinear(("query", "key", "value"), d, (d, d, d), bias=True)
        self.attention_out = Linear(d, d)
        self.attention_norm = nn.LayerNorm(d, config.norm_eps)
        self.up = Linear(d, config.intermediate_size)
        self.down = Linear(config.intermediate_size, d)
        self.norm = nn.LayerNorm(d, config.norm_eps)

    def forward(self, x: Tensor, runs: Runs) -> Tensor:
        """x: [tokens, hidden]."""
        x = self.attention_norm(x + self.attention_out(self._attend(x, runs)))
        out: Tensor = self.norm(x + self.down(functional.gelu(self.up(x))))
        return out

    def _attend(self, x: Tensor, runs: Runs) -> Tensor:
        query, key, value = self.qkv(x)
        mixed, first = torch.empty_like(x), 0
        for sequences, length in runs:
            rows = slice(first, first + sequences * length)
            shape = (sequences, length, self.heads, -1)
            q, k, v = (part[rows].view(shape).transpose(1, 2) for part in (query, key, value))
            mixed[rows] = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(sequences * length, -1)
            first = rows.stop
        return mixed


class Encoder(nn.Module):
    """Sequences of token ids to one vector each."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.words = nn.Embedding(config.vocab_size, d)
        self.positions = nn.Embedding(config.positions, d)
        self.types = nn.Embedding(config.token_types, d)
        self.norm = nn.LayerNorm(d, config.norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_layers))

    def forward(self, tokens: Tensor, runs: Runs) -> Tensor:
        """Hidden states [tokens, hidden] of the sequences in `tokens` [tokens], which lie one after another."""
        places = torch.cat([torch.arange(length).repeat(sequences) for sequences, length in runs])
        x: Tensor = self.norm(self.words(tokens) + self.positions(places) + self.types.weight[0])
        for layer in self.layers:
            x = layer(x, runs)
        return x

    @torch.inference_mode()
    def embed(self, sequences: Sequence[Sequence[int]]) -> Tensor:
        """[sequences, hidden]: the pooled hidden states, of length 1 where the model normalises. No sequence is empty or over `positions`."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        runs = [(len(list(group)), length) for length, group in itertools.groupby(len(sequences[index]) for index in order)]
        hidden = self(torch.tensor([token for index in order for token in sequences[index]]), runs)
        pooled, first = [], 0
        for count, length in runs:
            states = hidden[first : first + count * length].view(count, length, -1)
            pooled.append(states.mean(1) if self.config.pooling == "mean" else states[:, 0])
            first += count * length
        vectors = torch.empty(len(sequences), self.config.hidden_size)
        vectors[order] = torch.cat(pooled)
        return functional.normalize(vectors, dim=-1) if self.config.normalize else vectors


@dataclass(frozen=True)
class LoadedEncoder:
    """An encoder ready to run. `encode` gives a text's ids with the model's own marks around them."""

    name: str
    config: EncoderConfig
    encoder: Encoder
    tokenizer: tokenizers.Tokenizer
    description: str

    def encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)


def load_encoder(name: str, progress: hub.Progress | None = None, *, packed: bool = True) -> LoadedEncoder:
    """An alias (`minilm`, pulled at first use) or a folder with config.json, tokenizer.json and safetensors.

    `packed` lays the linear layers out for this machine. Raises as `read_encoder_config`, and FormatError for a damaged file.
    """
    folder = hub.resolve(name, progress=progress)
    config = read_encoder_config(folder)
    read_json(folder / "tokenizer.json", MAX_JSON_BYTES)  # bounds, and better words than the library's
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # the library's own kind
        raise FormatError(f"tokenizer.json cannot be used ({str(error)[:100]})", "fetch the file again") from error
    tokenizer.no_truncation()  # a text that is too long is refused, not cut
    tokenizer.no_padding()
    if (size := tokenizer.get_vocab_size()) > config.vocab_size:
        raise FormatError(f"tokenizer.json has {size:,} tokens, config.json {config.vocab_size:,}", "the files do not belong together")
    encoder = _assembled(config, folder)
    if packed:
        pack(encoder)
    alias = hub.aliases().get(name)
    title = alias.title.split(",")[0] if alias is not None else folder.resolve().name
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    facts = [f"{config.parameters() / 1e6:,.1f} M parameters", f"{config.num_layers} layers", f"{config.hidden_size} dimensions"]
    facts += [f"{config.pooling} pooling", f"at most {config.max_tokens} tokens", *([f"licence {alias.licence}"] if alias else [])]
    return LoadedEncoder(name, config, encoder, tokenizer, f"{title}: BERT encoder, {', '.join(facts)}, {format_bytes(size)}")


def _assembled(config: EncoderConfig, folder: Path) -> Encoder:
    with torch.device("meta"), NoInit():
        encoder = Encoder(config)
    names = {ours: _hf_name(ours) for ours, _ in encoder.named_parameters()}
    with opened_tensors(folder) as (stored, read):
        prefix = "" if names["words.weight"] in stored else "bert."  # as a model with a head writes it
        wanted = {f"{prefix}{name}" for name in names.values()}
        if missing := sorted(wanted - set(stored)):
            raise FormatError(f"tensor {missing[0]} is missing ({len(missing)} of {len(wanted)} are)", "fetch the weights again")
        unused = ("pooler.", "cls.", "embeddings.position_ids")  # no part of an embedding
        if unexpected := [name for name in stored if name not in wanted and not name.removeprefix(prefix).startswith(unused)]:
            raise FormatError(f"tensor {unexpected[0]} has no place in this encoder", "weights and config do not belong together")
        tensors = {ours: read(prefix + theirs).float() for ours, theirs in names.items()}
    for ours, parameter in encoder.named_parameters():
        if tensors[ours].shape != parameter.shape:
            raise FormatError(
                f"tensor {names[ours]} has shape {list(tensors[ours].shape)}, the config says {list(parameter.shape)}",
                "weights and config do not belong together",
            )
    encoder.load_state_dict(tensors, assign=True)
    return encoder.eval().requires_grad_(False)


def _hf_name(ours: str) -> str:
    """`layers.0.qkv.query.weight` -> `encoder.layer.0.attention.self.query.weight`."""
    top = {"words": "word_embeddings", "positions": "position_embeddings", "types": "token_type_embeddings", "norm": "LayerNorm"}
    parts = {
        "attention_out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "up": "intermediate.dense",
        "down": "output.dense",
        "norm": "output.LayerNorm",
    }
    if not ours.startswith("layers."):
        name, leaf = ours.split(".")
        return f"embeddings.{top[name]}.{leaf}"
    _, layer, rest = ours.split(".", 2)
    module, leaf = rest.rsplit(".", 1)
    theirs = f"attention.self.{module.removeprefix('qkv.')}" if module.startswith("qkv.") else parts[module]
    return f"encoder.layer.{layer}.{theirs}.{leaf}"
