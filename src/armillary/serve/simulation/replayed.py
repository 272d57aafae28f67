"""A real run in virtual time: its iterations' durations and what each of them saw are fed back, and the same schedules must come out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.request import Request
from armillary.serve.schedule import Plan, Schedule, SchedulerPolicy, State
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.sim.batch import Batch


class Witness:
    """A policy that says what `inner` says, and notes which request each iteration was the first to see.

    A request that is submitted while an iteration is being carried out is seen by the next one. Times alone do not tell: between the end
    of an iteration and the beginning of the next there is a moment in which one may come in time or not.
    """

    def __init__(self, inner: SchedulerPolicy) -> None:
        self.inner = inner
        self.name, self.returns_together, self.behind = inner.name, inner.returns_together, inner.behind
        self.seen: dict[str, int] = {}  # request -> iteration
        self._newest = -1

    def step(self, state: State) -> Schedule:
        newest = self._newest
        for request in state.waiting:
            if request.number > newest:
                self.seen.setdefault(request.id, state.index)
                self._newest = max(self._newest, request.number)
        return self.inner.step(state)


@dataclass(frozen=True, slots=True)
class _Ends:
    """Cost model of no use by itself: durations are of iterations, not of batches."""

    name: str = "as it was"

    def iteration(self, batch: Batch) -> int:
        raise InputError("durations that were measured are of iterations, not of batches", "run them with Replayed")

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        raise InputError("durations that were measured are of iterations, not of batches", "run them with Replayed")


class Replayed(VirtualExecutor):
    """Iteration i ends at `ends[i]` ns, and token p of a request's answer is `tokens[id][p]`.

    Raises InputError for an iteration that the real run did not have: then the schedules are not the same.
    """

    def __init__(self, clock: VirtualClock, ends: Sequence[int], tokens: Mapping[str, Sequence[int]]) -> None:
        super().__init__(clock, _Ends(), lambda request, position: tokens[request.id][position - len(request.prompt)])
        self._ends = np.array(ends, dtype=np.int64)

    def duration(self, plan: Plan, *, ahead: bool = False) -> int:
        return int(self.durations(plan, 1)[0])

    def durations(self, plan: Plan, count: int) -> NDArray[np.int64]:
        first = plan.schedule.index
        found = self._ends[first : first + count]
        if len(found) < count:
            raise InputError(
                f"the real run had {len(self._ends):,} iterations, and this one has more", "the schedules differ: compare them"
            )
        return np.diff(found, prepend=self.clock.now())


def run_again(config: EngineConfig, requests: Sequence[Request], seen: Mapping[str, int], ends: Sequence[int], trace: Trace) -> None:
    """`requests` that have ended for real, in the order in which they were submitted, once more in virtual time and into `trace`.

    `seen` is a `Witness`'s, `ends` are when the real iterations ended (ns of the clock of the arrivals). Each request arrives here when the
    iteration ends before the one that saw it, so it never waited longer than it did: policies that ask for the time (`max_wait`,
    `tbt_target`) may say something else.
    """
    first = min(request.arrival or 0 for request in requests)
    tokens = {request.id: request.output for request in requests}
    again = [
        Request(
            request.id,
            request.prompt,
            replace(request.sampling, max_tokens=len(request.output), ignore_eos=True, stop=(), stop_token_ids=()),
            arrival=ends[seen[request.id] - 1] if seen[request.id] else first,
            priority=request.priority,
            cache_salt=request.cache_salt,
        )
        for request in requests
    ]
    replay(VirtualEngine(Replayed(VirtualClock(first), ends, tokens), config, trace=trace), again)
