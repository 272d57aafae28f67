"""A flat, padding-free batch, and who computes its logits: torch (`TorchForward`) or the CPU kernels (`NativeForward`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from armillary.kernels.low_rank import Layer
from armillary.kernels.paged_attention import Span

__all__ = ["FlatBatch", "Forward", "PackedAdapter", "Span", "TakesAdapters"]


class PackedAdapter(Protocol):
    """An adapter as one `Forward` wants it."""

    @property
    def nbytes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The tokens of all sequences one after another. `spans` say whose they are, in order; `rows` whose logits are wanted.

    `adapters[i]` is what `TakesAdapters.pack_adapter` made of the adapter of span i, or None; all None when there are none.
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    rows: Sequence[int]
    adapters: Sequence[PackedAdapter | None] = ()
    hidden: bool = False  # whether the rows' hidden states are wanted beside their logits


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of a batch's rows [rows, vocab], valid until the next batch, and what greedy sampling needs, when it is known.

    `peak` [rows] is each row's largest logit (NaN when any is NaN), `best` [rows] the first token that has it. `hidden` [rows, hidden]
    is the final norm's output when the batch asked for it; None from who cannot give it.
    """

    values: Tensor
    peak: Tensor | None = None
    best: Tensor | None = None
    hidden: Tensor | None = None


class Forward(Protocol):
    """A model with its KV pool: computes a batch, stores its keys and values, gives the logits of the rows that are wanted."""

    @property
    def name(self) -> str: ...

    @property
    def own_threads(self) -> bool:
        """Whether it computes with threads of its own, not with torch's."""
        ...

    @property
    def prepared(self) -> str:
        """How the weights came to lie as they do, and how long it took, in words."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    def logits(self, batch: FlatBatch) -> Logits: ...

    def with_layers(self, kept: Sequence[int]) -> Forward:
        """The same weights, of the layers only those in `kept`, in order, and a KV pool of its own of as many blocks: for drafting."""
        ...

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Keys and values of KV blocks, each (from, to); no block is both."""
        ...

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """Keys and values of KV blocks as bytes, uint8 [blocks, bytes a block]: what `write_blocks` of a like pool takes."""
        ...

    def write_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        """Raises InputError when `data` is not of this pool's size."""
        ...


@runtime_checkable
class TakesAdapters(Protocol):
    """A `Forward` whose batches may have adapters: low-rank terms beside the products, rows of one adapter computed together."""

    def pack_adapter(self, layers: Sequence[Layer]) -> PackedAdapter:
        """Raises InputError for an adapter of another model."""
        ...
