"""Every operation takes the longer of its arithmetic and its bytes (Williams et al., "Roofline", CACM 2009), collectives by alpha-beta."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch
from armillary.sim.costs.model import whole, whole_one

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
_KEPT: Final = 100_000  # sums of what does not vary


@dataclass(frozen=True, slots=True)
class Rates:
    """What one device attains, and what each iteration costs beside it."""

    flops: float  # FLOP/s of products of the model's formats
    bandwidth: float  # B/s from its memory
    launch: float = 0.0  # ns an operation, before it computes
    host: float = 0.0  # ns an iteration, for its schedule and its tokens ...
    host_per_sequence: float = 0.0  # ... and more for each sequence


@dataclass(frozen=True, slots=True)
class Stage:
    """The operations of one pipeline stage's device, each row one that `repeat` layers do alike, linear in the batch's features.

    flops, moved, message: [rows, features]. An operation happens where its feature `gate` is 1. A collective takes `latency` ns and
    `per_byte` ns a byte of its message; both are 0 for other rows.
    """

    flops: Integers
    moved: Integers
    message: Integers
    gate: Integers  # [rows]: the index of a feature
    repeat: Integers  # [rows]
    latency: Floats  # [rows]
    per_byte: Floats  # [rows]


class Features(Protocol):
    """What of a batch the operations depend on."""

    varying: Sequence[int]
    """Features that differ from iteration to iteration even where the batch has as many tokens, sequences and rows: what attention reads."""

    def of(self, batch: Batch) -> Sequence[int]: ...

    def read(self, sequences: int, cached: Integers) -> dict[int, Integers]:
        """The varying features of batches of decodes that read `cached` tokens in all. [iterations]"""
        ...


@dataclass(frozen=True, slots=True)
class _Row:
    """A row that depends on a varying feature: (feature, coefficient) of its FLOPs and bytes."""

    flops: tuple[tuple[int, int], ...]
    moved: tuple[tuple[int, int], ...]
    gate: int
    repeat: int


class Roofline:
    """A model on devices of known rates. A batch goes through its pipeline stages one after another; their times add up.

    Most rows depend on the numbers of tokens, sequences and logits alone, and a scheduler with a budget sees few of these again and again:
    they are summed once. What attention reads is added each time.
    """

    def __init__(self, name: str, stages: Sequence[Stage], features: Features, rates: Rates) -> None:
        self.name, self.rates = name, rates
        self._features = features
        varying = set(features.varying)
        self._rows: list[_Row] = []
        self._steady: list[Stage] = []
        for stage in stages:
            mine = [place for place in range(len(stage.gate)) if any(stage.flops[place, i] or stage.moved[place, i] for i in varying)]
            self._rows += [
                _Row(_terms(stage.flops[place]), _terms(stage.moved[place]), int(stage.gate[place]), int(stage.repeat[place]))
                for place in mine
            ]
            rest = [place for place in range(len(stage.gate)) if place not in mine]
            self._steady.append(Stage(*(getattr(stage, column)[rest] for column in Stage.__dataclass_fields__)))
        self._known: dict[tuple[int, int, int, int], float] = {}

    def iteration(self, batch: Batch) -> int:
        return whole_one(self.ns(batch))

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        return whole(self.each(sequences, cached, count))

    def ns(self, batch: Batch) -> float:
        """`iteration` before it is rounded."""
        features = self._features.of(batch)
        return self._fixed(batch, features) + float(self._attention(features, max))

    def each(self, sequences: int, cached: int, count: int) -> NDArray[np.float64]:
        """`decodes` before they are rounded. [count]"""
        batch = Batch((), sequences, cached, sequences)
        features: list[Any] = list(self._features.of(batch))
        for index, values in self._features.read(sequences, cached + sequences * np.arange(count, dtype=np.int64)).items():
            features[index] = values
        ns = self._fixed(batch, features) + self._attention(features, np.maximum)
        return ns if isinstance(ns, np.ndarray) else np.full(count, ns)

    def _attention(self, features: Sequence[Any], longer: Callable[[Any, Any], Any]) -> Any:
        """ns of the rows that vary: of one iteration (numbers), or of many (arrays)."""
        rates, ns = self.rates, 0.0
        for row in self._rows:
            if not features[row.gate]:
                continue
            flops = sum([coefficient * features[index] for index, coefficient in row.flops])
            moved = sum([coefficient * features[index] for index, coefficient in row.moved])
            ns = ns + (longer(flops * (1e9 / rates.flops), moved * (1e9 / rates.bandwidth)) + rates.launch) * row.repeat
        return ns

    def _fixed(self, batch: Batch, features: Sequence[Any]) -> float:
        """ns of everything else."""
        key = (batch.prompt_tokens, batch.decodes, batch.sampled, batch.sequences)
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            known = self._known[key] = self._sum(batch, features)
        return known

    def _sum(self, batch: Batch, features: Sequence[Any]) -> float:
        rates = self.rates
        # What varies has no coefficient in these rows.
        values = np.array([value if isinstance(value, int) else 0 for value in features], dtype=np.int64)
        ns = rates.host + rates.host_per_sequence * batch.sequences
        for stage in self._steady:
            busy = np.maximum(stage.flops @ values * (1e9 / rates.flops), stage.moved @ values * (1e9 / rates.bandwidth))
            busy += stage.message @ values * stage.per_byte
            busy += (rates.launch + stage.latency) * values[stage.gate]
            ns += float(busy @ stage.repeat)
        return ns


def _terms(coefficients: Integers) -> tuple[tuple[int, int], ...]:
    return tuple((index, int(value)) for index, value in enumerate(coefficients) if value)
