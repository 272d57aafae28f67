"""The model's weights on three tiers, a flat run of bytes for each unit (a layer, or a piece of the head), and layers that compute from such a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.stored import Weights
from armillary.models.weights import skeleton
from armillary.serve.offload.arena import Arena, aligned, as_floats
from armillary.serve.offload.disk import on_disk
from armillary.serve.offload.layout import Layout, Piece, block_pieces
from armillary.serve.offload.policy import Tier

EMBEDDING = "model.embed_tokens.weight"


class TieredWeights:
    """Every unit at its home, and two buffers in the arena through which those pass whose home is elsewhere.

    The table of embeddings stays out of the arena: only the rows of a batch's tokens are read. A tied head's pieces share its memory where
    they live on the same tier. `release`: the source gives its tensors up as they are copied.
    """

    def __init__(self, weights: Weights, layout: Layout, arena: Arena, folder: Path, *, release: bool = False) -> None:
        config = self.config = weights.config
        self.layout = layout
        self.pieces = block_pieces(config)
        self.skeleton = _bound(config, self.pieces)
        self._owners = [[block.get_submodule(piece.module) for piece in self.pieces] for block in self.skeleton.layers]
        self.norm = as_floats(arena.take(4 * config.hidden_size, "weights"), (config.hidden_size,))
        self.norm.copy_(weights.tensor("model.norm.weight"))
        self.skeleton.norm.weight = self.norm  # type: ignore[assignment]
        disk = layout.policy.weights.disk > 0
        self._table_tier = Tier.DISK if disk else Tier.RAM
        table = weights.tensor(EMBEDDING).float().contiguous()
        if disk:
            self.table = as_floats(on_disk(table.nbytes, folder), table.shape)
            self.table.copy_(table)
        else:
            self.table = table
        self.skeleton.embed_tokens.weight = nn.Parameter(self.table, requires_grad=False)
        self.homes: list[Tensor] = []
        for index in range(config.num_layers):
            home = self._home(index, arena, folder)
            for piece, view in zip(self.pieces, self.views(home), strict=True):
                row = 0
                for source in piece.sources:
                    name = f"model.layers.{index}.{source}"
                    part = weights.tensor(name)
                    view[row : row + len(part)].copy_(part)
                    row += len(part)
                    if release:
                        weights.release(name)
            self.homes.append(home)
        head = table if config.tie_embeddings else weights.tensor("lm_head.weight")
        for index in range(config.num_layers, len(layout.unit_bytes)):
            first, end = self.rows_of(index)
            if config.tie_embeddings and layout.weight_tiers[index] is self._table_tier:
                self.homes.append(self.table[first:end].view(-1).view(torch.uint8))
                continue
            home = self._home(index, arena, folder)
            as_floats(home, (end - first, config.hidden_size)).copy_(head[first:end])
            self.homes.append(home)
        if release and not config.tie_embeddings:
            weights.release("lm_head.weight")
        size = max(layout.unit_bytes)
        self.buffers = [arena.take(size, "weight buffers") for _ in range(2)] if self.moves else []

    @property
    def moves(self) -> bool:
        """Whether any unit's home is elsewhere."""
        return any(tier is not Tier.ARENA for tier in self.layout.weight_tiers)

    @property
    def nbytes(self) -> int:
        """On all tiers, a tied head's shared rows once."""
        shared = [
            index
            for index in range(self.config.num_layers, len(self.homes))
            if self.config.tie_embeddings and self.layout.weight_tiers[index] is self._table_tier
        ]
        return self.table.nbytes + self.norm.nbytes + sum(home.nbytes for index, home in enumerate(self.homes) if index not in shared)

    def rows_of(self, unit: int) -> tuple[int, int]:
        """Which of the vocabulary a piece of the head answers for."""
        first = (unit - self.config.num_layers) * self.layout.head_rows
        return first, min(first + self.layout.head_rows, self.config.vocab_size)

    def load(self, unit: int, buffer: int) -> int:
        """Copy a unit into a buffer; returns the bytes."""
        home = self.homes[unit]
        np.copyto(self.buffers[buffer].numpy()[: home.nbytes], home.numpy())  # releases the interpreter while it copies
        return home.nbytes

    def views(self, flat: Tensor) -> list[Tensor]:
        """The tensors of a layer within its bytes, as `block_pieces` names them."""
        views, start = [], 0
        for piece in self.pieces:
            views.append(as_floats(flat[start:], piece.shape))
            start += piece.nbytes
        return views

    def bind(self, layer: int, views: Sequence[Tensor]) -> None:
        """Let a layer of `skeleton` compute with these."""
        for owner, piece, view in zip(self._owners[layer], self.pieces, views, strict=True):
            setattr(owner, piece.leaf, view)

    def _home(self, unit: int, arena: Arena, folder: Path) -> Tensor:
        size, tier = self.layout.unit_bytes[unit], self.layout.weight_tiers[unit]
        if tier is Tier.ARENA:
            return arena.take(size, "weights")
        return aligned(size) if tier is Tier.RAM else on_disk(size, folder)


class _Linear(nn.Module):
    """x @ weight.T + bias with tensors that are set from outside; several projections of one input are one product."""

    weight: Tensor

    def __init__(self, sizes: Sequence[int] | None) -> None:
        super().__init__()
        self.sizes = sizes
        self.bias: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        out = functional.linear(x, self.weight, self.bias)
        return out if self.sizes is None else torch.split(out, list(self.sizes), -1)


def _bound(config: ModelConfig, pieces: Sequence[Piece]) -> Decoder:
    """A decoder without memory whose layers take their tensors as attributes."""
    decoder = skeleton(config).eval()
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for block in decoder.layers:
        inner = (config.intermediate_size, config.intermediate_size)
        for name, sizes in (("self_attn.qkv", (q, kv, kv)), ("self_attn.o_proj", None), ("mlp.gate_up", inner), ("mlp.down_proj", None)):
            block.set_submodule(name, _Linear(sizes))
        for piece in pieces:
            block.get_submodule(piece.module)._parameters.pop("weight", None)
    decoder.norm._parameters.pop("weight")
    return decoder
