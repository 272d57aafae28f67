"""Batches in flight over pipeline stages: a batch is in one stage at a time, and a stage has one batch at a time, in the order in which they came
(Yu et al., Orca, OSDI 2022, section 4.2). Each batch has a scheduler, requests and KV blocks of its own, as the virtual engines of vLLM had."""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.schedule import Plan
from armillary.serve.simulation.engine import VirtualEngine
from armillary.sim.batch import Read
from armillary.sim.costs import CostModel
from armillary.sim.costs.roofline import Roofline

Parts = list[list[int]]
"""ns that each stage takes of each of several iterations. [iterations, stages]"""


class Lane(VirtualExecutor):
    """Carries out one of the batches in flight. What an iteration takes alone lies over the stages as their rooflines do, whatever cost model
    says how long that is; `parts` are those of the plan that was last asked about."""

    def __init__(
        self,
        clock: VirtualClock,
        cost: CostModel,
        pipeline: Pipeline,
        stages: Sequence[Roofline],
        reads: Callable[[Plan], Read] | None = None,
    ) -> None:
        super().__init__(clock, cost, reads=reads)
        self.pipeline = pipeline
        self.parts: Parts = []
        self._stages = stages

    def duration(self, plan: Plan, *, ahead: bool = False) -> int:
        alone, batch = super().duration(plan, ahead=ahead), self._batch(plan)
        self.parts = _split(np.array([[stage.ns(batch)] for stage in self._stages]), np.array([alone]))
        return alone

    def durations(self, plan: Plan, count: int) -> NDArray[np.int64]:
        alone, entries = super().durations(plan, count), plan.schedule.entries
        sequences, cached = len(entries), sum(entry.start for entry in entries)
        self.parts = _split(np.array([stage.each(sequences, cached, count) for stage in self._stages]), alone)
        return alone


def _split(ns: NDArray[np.float64], alone: NDArray[np.int64]) -> Parts:
    """`alone` ns of each iteration in proportion to `ns` of the stages, whole and adding up. [stages, iterations] -> [iterations, stages]"""
    ends = np.rint(np.cumsum(ns, axis=0) / ns.sum(axis=0) * alone).astype(np.int64)
    ends[-1] = alone
    parts: Parts = np.diff(ends, axis=0, prepend=0).T.tolist()
    return parts


class Flight:
    """Iterations of a lane from `start` ns: what each takes of each stage, and when those end that are foreseen."""

    def __init__(self, start: int, parts: Parts) -> None:
        self.start, self.parts = start, parts
        self.ends: list[int] = []

    def begun(self, before: int) -> int:
        """How many begin before that ns, of those that are foreseen."""
        return min(len(self.ends), 1 + bisect_left(self.ends, before))

    def under_way(self, before: int) -> int:
        """When the last of them began."""
        count = self.begun(before)
        return self.start if count < 2 else self.ends[count - 2]


class Pipeline:
    """The `stages` of one replica and the flights of its `lanes` through them.

    Ends are foreseen until a lane has ended all of its flight, for what it does then is not known. Nothing that has begun is changed by what
    begins later.
    """

    def __init__(self, stages: int, lanes: int) -> None:
        self.stages = stages
        self.flights: list[Flight | None] = [None] * lanes
        self.busy = 0  # ns of all stages together, of iterations that have ended
        self._entered: list[tuple[int, list[int]]] = [(-1, [0] * stages)]  # when iterations began, and when each left each stage free

    def begin(self, lane: int, now: int, parts: Parts) -> None:
        """A lane's next iterations. `foresee` must follow."""
        self.flights[lane] = Flight(now, parts)

    def call_off(self, lane: int, at: int) -> None:
        """What of a lane has not begun before `at` ns. `foresee` must follow."""
        flight = self.flights[lane]
        assert flight is not None
        del flight.parts[flight.begun(at) :]

    def end(self, lane: int) -> list[int]:
        """The lane has ended all that was foreseen of its flight, at these ns."""
        flight = self.flights[lane]
        assert flight is not None
        self.flights[lane] = None
        self.busy += sum(map(sum, flight.parts[: len(flight.ends)]))
        return flight.ends

    def foresee(self, before: int) -> None:
        """All ends that are known when what has begun before that ns stands."""
        entered, waiting = self._entered, list[tuple[int, int]]()
        while entered[-1][0] >= before:
            entered.pop()
        del entered[:-1]
        free, horizon = entered[0][1], math.inf
        for lane, flight in enumerate(self.flights):
            if flight is None:
                continue
            del flight.ends[flight.begun(before) :]
            if len(flight.ends) < len(flight.parts):
                waiting.append((flight.ends[-1] if flight.ends else flight.start, lane))
            else:
                horizon = min(horizon, flight.ends[-1])
        heapq.heapify(waiting)
        while waiting and waiting[0][0] < horizon:
            at, lane = heapq.heappop(waiting)
            flight = self.flights[lane]
            assert flight is not None
            end, after = at, list[int]()
            for ready, part in zip(free, flight.parts[len(flight.ends)], strict=True):
                end = (end if end > ready else ready) + part
                after.append(end)
            free = after
            entered.append((at, free))
            flight.ends.append(end)
            if len(flight.ends) < len(flight.parts):
                heapq.heappush(waiting, (end, lane))
            else:
                horizon = min(horizon, end)


def pipeline_of(engine: VirtualEngine) -> Pipeline:
    """That of a lane's engine. Raises InputError for one that is no lane."""
    if not isinstance(engine.virtual, Lane):
        raise InputError("an engine without a pipeline is no lane", "give its executor one")
    return engine.virtual.pipeline


def parts_of(engine: VirtualEngine) -> Parts:
    """Of what a lane's engine has just begun."""
    assert isinstance(engine.virtual, Lane)
    return engine.virtual.parts


def busy(engines: Iterable[VirtualEngine]) -> int:
    """ns of iterations of all engines together; of several batches in flight over a pipeline those of a stage, on average."""
    pipelines, ns = dict[int, Pipeline](), 0
    for engine in engines:
        if isinstance(executor := engine.virtual, Lane):
            pipelines[id(executor.pipeline)] = executor.pipeline
        else:
            ns += engine.busy
    return ns + sum(round(one.busy / one.stages) for one in pipelines.values())
