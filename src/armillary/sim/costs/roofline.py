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

    def varied(self, batch: Batch) -> Sequence[int]:
        """The varying ones alone, in the order of `varying`."""
        ...

    def read(self, sequences: int, cached: Integers) -> Sequence[Integers | int]:
        """`varied` of batches of decodes that read `cached` tokens in all. [iterations]"""
        ...


_Terms = tuple[tuple[int, int], ...]
"""(place, coefficient) of what is added up."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a stage, its counts split into what the steady features give and what the varying ones do, each by its own place among them."""

    flops: tuple[_Terms, _Terms]
    moved: tuple[_Terms, _Terms]
    message: _Terms
    gate: int
    repeat: int
    latency: float
    per_byte: float


@dataclass(frozen=True, slots=True)
class _Known:
    """What batches of as many tokens, sequences and logits have in common: ns of the rows that do not vary, and of those that do (FLOPs, what
    varies of them, bytes, what varies of them, repetitions)."""

    ns: float
    rows: tuple[tuple[int, _Terms, int, _Terms, int], ...]


class Roofline:
    """A model on devices of known rates. A batch goes through its pipeline stages one after another; their times add up.

    Most rows depend on the numbers of tokens, sequences and logits alone, and a scheduler with a budget sees few of these again and again:
    they are summed once. What attention reads is added each time.
    """

    def __init__(self, name: str, stages: Sequence[Stage], features: Features, rates: Rates) -> None:
        self.name, self.rates = name, rates
        self._features = features
        places = {index: place for place, index in enumerate(features.varying)}

        def split(coefficients: Integers) -> tuple[_Terms, _Terms]:
            terms = [(index, int(value)) for index, value in enumerate(coefficients) if value]
            varied = tuple([(places[index], value) for index, value in terms if index in places])
            return tuple([term for term in terms if term[0] not in places]), varied

        self._rows = [
            _Row(
                split(stage.flops[row]), split(stage.moved[row]), split(stage.message[row])[0], int(stage.gate[row]), int(stage.repeat[row]),
                float(stage.latency[row]), float(stage.per_byte[row]),
            )
            for stage in stages
            for row in range(len(stage.gate))
        ]  # fmt: skip
        self._known: dict[tuple[int, int, int, int], _Known] = {}

    def iteration(self, batch: Batch) -> int:
        return whole_one(self.ns(batch))

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        return whole(self.each(sequences, cached, count))

    def ns(self, batch: Batch) -> float:
        """`iteration` before it is rounded."""
        known = self._of(batch)
        return known.ns + float(self._attention(known, self._features.varied(batch), max))

    def each(self, sequences: int, cached: int, count: int) -> NDArray[np.float64]:
        """`decodes` before they are rounded. [count]"""
        known = self._of(Batch((), sequences, cached, sequences))
        reads = self._features.read(sequences, np.arange(cached, cached + count * sequences, sequences, dtype=np.int64))
        ns = known.ns + self._attention(known, reads, np.maximum)
        return ns if isinstance(ns, np.ndarray) else np.full(count, ns)

    def _attention(self, known: _Known, values: Sequence[Any], longer: Callable[[Any, Any], Any]) -> Any:
        """ns of the rows that vary: of one iteration (numbers), or of many (arrays)."""
        rates, ns = self.rates, 0.0
        per_flop, per_byte = 1e9 / rates.flops, 1e9 / rates.bandwidth
        for flops, flops_terms, moved, moved_terms, repeat in known.rows:
            for place, coefficient in flops_terms:
                flops = flops + coefficient * values[place]
            for place, coefficient in moved_terms:
                moved = moved + coefficient * values[place]
            ns = ns + (longer(flops * per_flop, moved * per_byte) + rates.launch) * repeat
        return ns

    def _of(self, batch: Batch) -> _Known:
        key = (batch.prompt_tokens, batch.decodes, batch.sampled, len(batch.prompts))
        known = self._known.get(key)
        if known is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            known = self._known[key] = self._summed(batch)
        return known

    def _summed(self, batch: Batch) -> _Known:
        rates, values = self.rates, self._features.of(batch)
        per_flop, per_byte = 1e9 / rates.flops, 1e9 / rates.bandwidth
        ns, varying = rates.host + rates.host_per_sequence * batch.sequences, []
        for row in self._rows:
            if not values[row.gate]:
                continue
            (flops_terms, flops_varied), (moved_terms, moved_varied) = row.flops, row.moved
            flops = sum([coefficient * values[index] for index, coefficient in flops_terms])
            moved = sum([coefficient * values[index] for index, coefficient in moved_terms])
            if flops_varied or moved_varied:
                varying.append((flops, flops_varied, moved, moved_varied, row.repeat))
                continue
            message = sum([coefficient * values[index] for index, coefficient in row.message])
            ns += (max(flops * per_flop, moved * per_byte) + message * row.per_byte + rates.launch + row.latency) * row.repeat
        return _Known(ns, tuple(varying))
