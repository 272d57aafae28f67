"""The paged KV cache on three tiers: each layer's pool at its home, and two windows in the arena for batches of layers that live elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from armillary.kernels.attention import AttentionSpec
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, checked_table, slots_below
from armillary.models.config import ModelConfig
from armillary.serve.offload.arena import Arena, aligned, as_floats
from armillary.serve.offload.compress import compress, compressed_bytes, expand
from armillary.serve.offload.disk import on_disk
from armillary.serve.offload.layout import Layout
from armillary.serve.offload.policy import Tier


class TieredCache(PagedCache):
    """The pool of all layers, with block numbers that mean the same on each tier; rows of bytes where it is compressed."""

    def __init__(self, config: ModelConfig, layout: Layout, num_blocks: int, block_size: int, arena: Arena, folder: Path) -> None:
        self.num_blocks, self.block_size, self.tiers = num_blocks, block_size, layout.cache_tiers
        slots, compressed = num_blocks * block_size, layout.policy.compress
        size = slots * layout.cache_row

        def pool(tier: Tier) -> Tensor:
            raw = arena.take(size, "cache") if tier is Tier.ARENA else aligned(size) if tier is Tier.RAM else on_disk(size, folder)
            return raw.view(slots, layout.cache_row) if compressed else as_floats(raw, (slots, config.num_kv_heads, config.head_dim))

        self.keys = [pool(tier) for tier in self.tiers]
        self.values = [pool(tier) for tier in self.tiers]
        self.windows: list[Window] = []
        if any(layout.cache_away):
            self.windows = [Window(config, layout.window_blocks, block_size, arena) for _ in range(2)]


class Window(PagedCache):
    """A pool of the arena that stands for whichever layer's keys and values were loaded into it last."""

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, arena: Arena) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        shape = (num_blocks * block_size, config.num_kv_heads, config.head_dim)
        size = 4 * shape[0] * shape[1] * shape[2]
        self.keys = [as_floats(arena.take(size, "cache windows"), shape)] * config.num_layers
        self.values = [as_floats(arena.take(size, "cache windows"), shape)] * config.num_layers


class WindowMap:
    """Where a batch's blocks are while they are in a window: the same order in every layer.

    `spans` are the batch's with block tables of the window. Blocks that hold something already (positions below a span's start) are loaded,
    and the slots of the new tokens are stored. Where the cache is compressed, the batch attends to what later ones will find: `rounded`.
    """

    def __init__(self, cache: TieredCache, spans: Sequence[Span]) -> None:
        size = cache.block_size
        tables = [checked_table(span, cache) for span in spans]
        filled = [table[: -(-span.start // size)] for table, span in zip(tables, spans, strict=True)]
        self.loaded = np.unique(np.concatenate(filled))
        fresh = np.setdiff1d(np.concatenate(tables), self.loaded)
        blocks = np.concatenate([self.loaded, fresh])  # those to be loaded stand first, next to each other
        order = np.argsort(blocks)
        moved = [order[np.searchsorted(blocks, table, sorter=order)] for table in tables]
        self.spans = tuple(Span(span.start, span.count, table.tolist()) for span, table in zip(spans, moved, strict=True))
        self.new_home = self._new(tables, spans, size)
        self.new_window = self._new(moved, spans, size)
        self._packed: dict[int, tuple[Tensor, Tensor]] = {}  # of a layer, the new keys and values that have not been stored

    @staticmethod
    def _new(tables: Sequence[np.ndarray], spans: Sequence[Span], size: int) -> np.ndarray:
        slots = [slots_below(table, span.start + span.count, size)[span.start :] for table, span in zip(tables, spans, strict=True)]
        return np.concatenate(slots)

    def load(self, cache: TieredCache, layer: int, window: Window) -> int:
        """The blocks of a layer that hold something, from their home into a window; returns the bytes."""
        moved = 0
        for home, there in ((cache.keys[layer], window.keys[layer]), (cache.values[layer], window.values[layer])):
            if home.dtype == torch.uint8:
                packed = torch.from_numpy(_rows(home, cache.num_blocks).take(self.loaded, 0).reshape(-1, home.shape[1]))
                expand(packed, there[: len(packed)].view(len(packed), there.shape[1] * there.shape[2]))
                moved += packed.nbytes
                continue
            into = _rows(there, window.num_blocks)[: len(self.loaded)]
            np.take(_rows(home, cache.num_blocks), self.loaded, 0, out=into, mode="clip")  # checked above; "raise" would copy twice
            moved += into.nbytes
        return moved

    def store(self, cache: TieredCache, layer: int, window: Window) -> int:
        """The new tokens of a layer, from a window to their home; returns the bytes."""
        moved = 0
        if layer in self._packed:
            for home, packed in zip((cache.keys[layer], cache.values[layer]), self._packed.pop(layer), strict=True):
                home.numpy()[self.new_home] = packed.numpy()
                moved += packed.nbytes
            return moved
        for home, there in ((cache.keys[layer], window.keys[layer]), (cache.values[layer], window.values[layer])):
            new = _rows(there, len(there)).take(self.new_window, 0)
            _rows(home, len(home))[self.new_home] = new
            moved += new.nbytes
        return moved

    def rounded(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """New keys and values [tokens, kv heads, head_dim] as they will be read again. They are kept compressed until they are stored."""
        packed, numbers = [], []
        for new in (k, v):
            rows = new.reshape(len(new), -1)
            packed.append(torch.empty(len(rows), compressed_bytes(rows.shape[1]), dtype=torch.uint8))
            compress(rows, packed[-1])
            numbers.append(torch.empty_like(rows))
            expand(packed[-1], numbers[-1])
        self._packed[layer] = (packed[0], packed[1])
        return numbers[0].view(new.shape), numbers[1].view(new.shape)


class RoundedAttend:
    """An `Attend` whose new keys and values are those of a compressed cache."""

    def __init__(self, attend: PagedAttend, where: WindowMap) -> None:
        self._attend, self._where = attend, where

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(spec, q, *self._where.rounded(spec.layer, k, v))


def _rows(pool: Tensor, count: int) -> np.ndarray:
    """A pool as [count, floats], in place."""
    return torch.flatten(pool).numpy().reshape(count, -1)
