"""A flat, padding-free batch, and who computes its logits: torch (`TorchForward`) or the CPU kernels (`NativeForward`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from armillary.kernels.paged_attention import Span

__all__ = ["FlatBatch", "Forward", "Span"]


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """The tokens of all sequences one after another. `spans` say whose they are, in order; `rows` whose logits are wanted."""

    tokens: Sequence[int]
    positions: Sequence[int]
    spans: Sequence[Span]
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Logits:
    """Logits of a batch's rows [rows, vocab], valid until the next batch, and what greedy sampling needs, when it is known.

    `peak` [rows] is each row's largest logit (NaN when any is NaN), `best` [rows] the first token that has it.
    """

    values: Tensor
    peak: Tensor | None = None
    best: Tensor | None = None


class Forward(Protocol):
    """A model with its KV pool: computes a batch, stores its keys and values, gives the logits of the rows that are wanted."""

    @property
    def name(self) -> str: ...

    @property
    def prepared(self) -> str:
        """How the weights came to lie as they do, and how long it took, in words."""
        ...

    @property
    def weight_bytes(self) -> int: ...

    @property
    def cache_bytes(self) -> int: ...

    def logits(self, batch: FlatBatch) -> Logits: ...
