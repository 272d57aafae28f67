"""Every operation takes the longer of its arithmetic and its bytes (Williams et al., "Roofline", CACM 2009), collectives by alpha-beta."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch
from armillary.sim.costs.model import whole, whole_one

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]


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

    def of(self, batch: Batch) -> list[int]: ...

    def decodes(self, sequences: int, cached: int, count: int) -> Integers:
        """Of `count` iterations of decodes, each of which reads `sequences` tokens more. [features, count]"""
        ...


class Roofline:
    """A model on devices of known rates. A batch goes through its pipeline stages one after another; their times add up."""

    def __init__(self, name: str, stages: Sequence[Stage], features: Features, rates: Rates) -> None:
        self.name, self.rates = name, rates
        self._stages, self._features = stages, features

    def iteration(self, batch: Batch) -> int:
        features = np.array(self._features.of(batch), dtype=np.int64)[:, None]
        return whole_one(float(self._nanoseconds(features, batch.sequences)[0]))

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        return whole(self._nanoseconds(self._features.decodes(sequences, cached, count), sequences))

    def _nanoseconds(self, features: Integers, sequences: int) -> Floats:
        """[features, iterations] -> [iterations]. Sums run row by row, so that an iteration costs the same alone and among others."""
        rates = self.rates
        ns = np.full(features.shape[1], rates.host + rates.host_per_sequence * sequences)
        for stage in self._stages:
            busy = np.maximum(stage.flops @ features * (1e9 / rates.flops), stage.moved @ features * (1e9 / rates.bandwidth))
            busy += stage.message @ features * stage.per_byte[:, None]
            busy += (rates.launch + stage.latency)[:, None] * features[stage.gate]
            ns = ns + np.add.accumulate(busy * stage.repeat[:, None], axis=0)[-1]
        return ns
