"""A replica whose pipeline stages hold one batch each, in virtual time: as Orca and Sarathi-Serve keep their stages busy."""

from __future__ import annotations

from armillary.core.clock import VirtualClock
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.schedule import Plan
from armillary.sim.costs import CostModel


class Staged(VirtualExecutor):
    """Carries out one of the batches that take turns in a pipeline, each the batch of an engine of its own.

    A batch passes the stages one after another, each stage a part of `cost` that is the same for all, and waits where another batch is: that
    wait is the bubble that uneven batches cause. `free` are the times (ns) from which on the stages are free, one list for all engines of the
    pipeline, which must be run in the order of time and step every iteration.
    """

    def __init__(self, clock: VirtualClock, cost: CostModel, free: list[int]) -> None:
        super().__init__(clock, cost)
        self._free = free

    def duration(self, plan: Plan, *, ahead: bool = False) -> int:
        each, now = -(-super().duration(plan, ahead=ahead) // len(self._free)), self.clock.now()
        at = now
        for stage, free in enumerate(self._free):
            at = self._free[stage] = max(at, free) + each
        return at - now
