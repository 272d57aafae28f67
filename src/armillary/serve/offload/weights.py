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
from armillary.serve.offload.compress import compress, compressed_bytes, expand
from armillary.serve.offload.disk import on_disk
from armillary.serve.offload.layout import Layout, Piece, block_pieces
from armillary.serve.offload.policy import Tier

EMBEDDING = "model.embed_tokens.weight"


class TieredWeights:
    """Every unit at its home, and two buffers in the arena through which those pass whose home is elsewhere.

    The table of embeddings stays out of the arena, and is never compressed: only the rows of a batch's tokens are read. A tied head's pieces
    share its memory where they live on the same tier as they are. `release`: the source gives its tensors up as they are copied.
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
            for piece, kept in zip(self.pieces, self._kept(home), strict=True):
                row = 0
                for source in piece.sources:
                    name = f"model.layers.{index}.{source}"
                    part = weights.tensor(name)
                    _keep(part, kept[row : row + len(part)])
                    row += len(part)
                    if release:
                        weights.release(name)
            self.homes.append(home)
        head = table if config.tie_embeddings else weights.tensor("lm_head.weight")
        for index in range(config.num_layers, len(layout.unit_bytes)):
            first, end = self.rows_of(index)
            if self._shares_table(index):
                self.homes.append(self.table[first:end].view(-1).view(torch.uint8))
                continue
            home = self._home(index, arena, folder)
            _keep(head[first:end], self._kept_head(home, end - first))
            self.homes.append(home)
        if release and not config.tie_embeddings:
            weights.release("lm_head.weight")
        size = max(layout.unit_bytes)
        self.buffers = [arena.take(size, "weight buffers") for _ in range(2)] if self.moves else []

    @property
    def moves(self) -> bool:
        """Whether any unit's home is elsewhere."""
        return any(self.layout.weights_away)

    @property
    def nbytes(self) -> int:
        """On all tiers, a tied head's shared rows once."""
        shared = [index for index in range(self.config.num_layers, len(self.homes)) if self._shares_table(index)]
        return self.table.nbytes + self.norm.nbytes + sum(home.nbytes for index, home in enumerate(self.homes) if index not in shared)

    def rows_of(self, unit: int) -> tuple[int, int]:
        """Which of the vocabulary a piece of the head answers for."""
        first = (unit - self.config.num_layers) * self.layout.head_rows
        return first, min(first + self.layout.head_rows, self.config.vocab_size)

    def load(self, unit: int, buffer: int) -> int:
        """Copy a unit into a buffer, expanded; returns the bytes that left its home."""
        home = self.homes[unit]
        if self.layout.policy.compress:
            if unit < self.config.num_layers:
                for kept, view in zip(self._kept(home), self.views(self.buffers[buffer]), strict=True):
                    _restore(kept, view)
            else:
                first, end = self.rows_of(unit)
                _restore(self._kept_head(home, end - first), as_floats(self.buffers[buffer], (end - first, self.config.hidden_size)))
            return home.nbytes
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

    def _kept(self, home: Tensor) -> list[Tensor]:
        """The tensors of a layer within the bytes of its home: numbers, or [rows, bytes] uint8 where they are compressed."""
        kept, start, compress = [], 0, self.layout.policy.compress
        for piece in self.pieces:
            raw = home[start : start + piece.stored(compress)]
            packed = compress and len(piece.shape) == 2
            kept.append(_packed(raw, piece.shape[0], piece.shape[1]) if packed else as_floats(raw, piece.shape))
            start += piece.stored(compress)
        return kept

    def _kept_head(self, home: Tensor, rows: int) -> Tensor:
        width = self.config.hidden_size
        return _packed(home, rows, width) if self.layout.policy.compress else as_floats(home, (rows, width))

    def _shares_table(self, unit: int) -> bool:
        """Whether a piece of the head is the table of embeddings, where that lies."""
        tied = self.config.tie_embeddings and not self.layout.policy.compress
        return tied and self.layout.weight_tiers[unit] is self._table_tier

    def _home(self, unit: int, arena: Arena, folder: Path) -> Tensor:
        size, tier = self.layout.stored_bytes[unit], self.layout.weight_tiers[unit]
        if tier is Tier.ARENA:
            return arena.take(size, "weights")
        return aligned(size) if tier is Tier.RAM else on_disk(size, folder)


def _packed(raw: Tensor, rows: int, count: int) -> Tensor:
    size = compressed_bytes(count)
    return raw[: rows * size].view(rows, size)


def _keep(source: Tensor, kept: Tensor) -> None:
    """Numbers of the model to their home."""
    if kept.dtype == torch.uint8:
        compress(source.float(), kept)
    else:
        kept.copy_(source)


def _restore(kept: Tensor, numbers: Tensor) -> None:
    """And from there to where they are computed with."""
    if kept.dtype == torch.uint8:
        expand(kept, numbers)
    else:
        np.copyto(numbers.numpy(), kept.numpy())


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
