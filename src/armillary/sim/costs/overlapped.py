"""A host that works while the device does (NanoFlow's asynchronous scheduling, Zhu et al., OSDI 2025, section 4.4)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.sim.batch import Batch
from armillary.sim.costs.fitted import Host
from armillary.sim.costs.model import CostModel, whole_one


@dataclass(frozen=True, slots=True)
class Overlapped:
    """`device` knows nothing of the host. An iteration whose schedule was there when the one before it ended (`ahead`) takes the longer of
    the two, any other both, one after the other."""

    device: CostModel
    host: Host

    @property
    def name(self) -> str:
        return f"{self.device.name}, the host beside it"

    def iteration(self, batch: Batch) -> int:
        return self.device.iteration(batch) + self._host(batch)

    def ahead(self, batch: Batch, more: int = 0) -> int:
        """ns of an iteration whose schedule was made while the one before it ran, and which takes the device `more` ns."""
        return max(self.device.iteration(batch) + more, self._host(batch))

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        return self.device.decodes(sequences, cached, count) + self._host(Batch((), sequences, cached, sequences))

    def _host(self, batch: Batch) -> int:
        ns = self.host.of(batch)
        return whole_one(ns) if ns > 0 else 0


def priced(cost: Callable[..., CostModel], host: float, *, ahead: bool) -> CostModel:
    """The model that `cost(host=...)` makes, with `host` ns an iteration: after the device's time, or beside it where schedules are made `ahead`."""
    return Overlapped(cost(host=0.0), Host(host)) if ahead else cost(host=host)


def host_ns(us: float) -> float:
    """ns of so many microseconds an iteration. Raises InputError for what is no duration, or over a second."""
    if not (math.isfinite(us) and 0 <= us <= 1e6):
        raise InputError(f"a host that takes {us:g} microseconds an iteration", "give 0 to 1,000,000", field="host_us")
    return us * 1e3
