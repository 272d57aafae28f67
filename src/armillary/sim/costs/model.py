"""The interface of cost models."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch


class CostModel(Protocol):
    """How long an iteration takes, in ns of the device that the model stands for."""

    @property
    def name(self) -> str: ...

    def iteration(self, batch: Batch) -> int:
        """ns, at least 1."""
        ...

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        """ns of each of `count` iterations of `sequences` decodes, of which the first reads `cached` tokens in all, each next one `sequences` more.

        Exactly what `iteration` says of each, to the ns: that is what lets a simulation leap over them. [count]
        """
        ...


def whole(ns: NDArray[np.float64] | float) -> NDArray[np.int64]:
    """Durations as integers, at least 1: halves to even as `round` has them, so that one and many are rounded alike."""
    return np.maximum(np.rint(ns), 1.0).astype(np.int64)


def whole_one(ns: float) -> int:
    """`whole` of one."""
    return max(1, round(ns))
