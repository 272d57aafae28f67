"""Adapters beside the products of a torch decoder: the reference of `kernels/cpu/low_rank.h`, and the way where that cannot run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from armillary.core.errors import InputError
from armillary.kernels.cpu_library import PARTS
from armillary.kernels.low_rank import Layer, add_terms
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.lora_config import projections
from armillary.serve.executors.forward import FlatBatch


class TorchAdapter:
    """An adapter on the decoder's device. Raises InputError for one of another model."""

    def __init__(self, layers: Sequence[Layer], config: ModelConfig, device: torch.device) -> None:
        if len(layers) != config.num_layers:
            raise InputError(f"the adapter has {len(layers)} layers, the model {config.num_layers}", "give an adapter of this model")
        for (name, shape), low in zip(projections(config), (low for layer in layers for low in layer), strict=True):
            if low is not None and low.shape != shape:
                raise InputError(
                    f"{name} of the adapter stands beside a weight of {list(low.shape)}, the model's is {list(shape)}",
                    "give an adapter of this model",
                )
        self.layers = [[low and replace(low, a=low.a.to(device), b=low.b.to(device)) for low in layer] for layer in layers]

    @property
    def nbytes(self) -> int:
        return sum(low.nbytes for layer in self.layers for low in layer if low is not None)


Segments = list[tuple[Tensor, TorchAdapter]]  # the rows of a batch that have an adapter, by adapter


class Adapted:
    """Puts the terms of the batch's adapters beside a decoder's products, which it wraps in place."""

    def __init__(self, decoder: Decoder) -> None:
        self._segments: Segments = []
        self._device = decoder.embed_tokens.weight.device
        for index, layer in enumerate(decoder.layers):
            for owner, name, parts in (
                (layer.self_attn, "qkv", PARTS[:3]),
                (layer.self_attn, "o_proj", PARTS[3:4]),
                (layer.mlp, "gate_up", PARTS[4:6]),
                (layer.mlp, "down_proj", PARTS[6:]),
            ):
                setattr(owner, name, _WithTerms(getattr(owner, name), index, parts, self._segments))

    @contextmanager
    def chosen(self, batch: FlatBatch) -> Iterator[None]:
        """The pass within is over `batch`. Others compute with the same layers too (a self-draft), and have no adapters."""
        self.choose(batch)
        try:
            yield
        finally:
            self._segments.clear()

    def choose(self, batch: FlatBatch) -> None:
        """From now on passes are over `batch`."""
        rows: dict[TorchAdapter, list[int]] = {}
        first = 0
        for span, adapter in zip(batch.spans, batch.adapters, strict=False):
            if adapter is not None:
                assert isinstance(adapter, TorchAdapter)
                rows.setdefault(adapter, []).extend(range(first, first + span.count))
            first += span.count
        self._segments[:] = [(torch.tensor(of, device=self._device), adapter) for adapter, of in rows.items()]


class _WithTerms(nn.Module):
    def __init__(self, product: nn.Module, layer: int, parts: Sequence[str], segments: Segments) -> None:
        super().__init__()
        self.product, self._layer, self._segments = product, layer, segments
        self._parts = [PARTS.index(part) for part in parts]

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        found: Tensor | tuple[Tensor, ...] = self.product(x)
        if self._segments:
            for part, y in zip(self._parts, found if isinstance(found, tuple) else (found,), strict=True):
                add_terms(y, x, [(rows, adapter.layers[self._layer][part]) for rows, adapter in self._segments])
        return found
