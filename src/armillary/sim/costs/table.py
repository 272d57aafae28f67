"""Operations as they were measured, between the points in proportion (Vidur: Agrawal et al., MLSys 2024); the rest by a roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch
from armillary.sim.costs.model import whole, whole_one
from armillary.sim.costs.profile import Curve
from armillary.sim.costs.roofline import Roofline

_KEPT: Final = 100_000


@dataclass(frozen=True, slots=True)
class Measured:
    """`repeat` operations, each of `per_token` x tokens (or bytes)."""

    curve: Curve
    per_token: float = 1.0
    repeat: int = 1


class Table:
    """What depends on the number of tokens is looked up; `rest` knows what was not measured: attention, which depends on what was
    computed before, and the logits."""

    def __init__(self, name: str, measured: Sequence[Measured], rest: Roofline) -> None:
        self.name = name
        self._measured, self._rest = tuple(measured), rest
        self._known: dict[int, float] = {}

    def iteration(self, batch: Batch) -> int:
        return whole_one(self._rest.ns(batch) + self.linear(batch.tokens))

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        return whole(self._rest.each(sequences, cached, count) + self.linear(sequences))

    def linear(self, tokens: int) -> float:
        """ns of all that was measured."""
        known = self._known.get(tokens)
        if known is None:
            if len(self._known) >= _KEPT:
                self._known.clear()
            known = self._known[tokens] = sum(one.curve.at(one.per_token * tokens) * one.repeat for one in self._measured)
        return known
