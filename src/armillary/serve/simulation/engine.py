"""The engine in virtual time: it decides as the real one does, and passes iterations that repeat at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.iteration_times import KEPT
from armillary.serve.lookahead import foresee
from armillary.serve.request import Event, FinishReason, Request
from armillary.serve.schedule import Entry, Hit, Plan, Reason, Repeating, Schedule, SchedulerPolicy
from armillary.serve.simulation.leap import Leap, affordable, first_end, first_full, growths, only_decodes
from armillary.serve.speculation import Drafter
from armillary.serve.verify import verify_outcome
from armillary.serve.workload.requests import in_order


class Recording(Protocol):
    """Who notes what happens to requests."""

    def ended(self, request: Request) -> None:
        """A request is over."""
        ...

    def waited(self, plan: Plan, ends: NDArray[np.int64]) -> None:
        """Iterations that repeat `plan` end at `ends` ns, and none of their tokens has been handed out. [iterations]"""
        ...


class VirtualEngine(Engine):
    """`begin` decides what comes next, `end` carries it out; `step` does both, as in the real engine, whose code all of it is.

    With `fast_forward` a schedule that repeats becomes one leap: durations in one array, tokens, blocks and counters in one go. What
    happens to every request, and the trace, are those of stepping (a law under test); only the page's list of recent iterations
    has one line a leap. `recorder` notes each request's times and the gaps between tokens; an engine that is not `told` of
    keeps nothing else: no story of any request for `explain`, no recent iterations.
    """

    def __init__(
        self,
        executor: VirtualExecutor,
        config: EngineConfig,
        *,
        trace: Trace | None = None,
        policy: SchedulerPolicy | None = None,
        drafter: Drafter | None = None,
        fast_forward: bool = True,
        recorder: Recording | None = None,
        told: bool = True,
    ) -> None:
        if trace is not None and not told:
            raise InputError(
                "a trace tells when requests waited, which an engine that keeps no stories does not know", "leave told, or the trace"
            )
        super().__init__(executor, config, clock=executor.clock, trace=trace, policy=policy, drafter=drafter, told=told)
        self.virtual, self.virtual_clock = executor, executor.clock
        self._foresees = config.async_scheduling == "on" and drafter is None  # drafts follow the token that is being drawn
        leaps = fast_forward and drafter is None and config.kv_policy == "dense" and not self._foresees
        # A policy that does not say whether it would say the same again is asked every time.
        self._repeating = self.policy if leaps and isinstance(self.policy, Repeating) else None
        self._sharing = config.prefix_cache == "on"
        self._recorder = recorder
        self._drafted = False
        if config.speculate != "off" and drafter is None:
            raise InputError(f"nobody proposes tokens here, as speculate {config.speculate} wants", "give a drafter", field="speculate")
        self.queued_tokens = 0  # of prompts that have not been started
        self.busy = 0  # ns of iterations that have ended, and of drafting

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return self._seats.queued

    @property
    def free_blocks(self) -> int:
        """KV blocks that nobody uses at the beginning of the present iterations."""
        return self._memory.pool.free_count

    @property
    def running(self) -> int:
        """Requests that run."""
        return len(self._seats.running)

    def submit(self, request: Request) -> None:
        super().submit(request)
        self.queued_tokens += len(request.prompt)

    def _begin_adapter(self, request: Request) -> None:
        if self.virtual.beside is None:  # else every adapter is in memory
            super()._begin_adapter(request)

    def draft(self) -> int:
        """Have tokens proposed for the next iteration, and give the time (ns) at which they are there: who comes by then is in time for it."""
        if self.drafter is not None and not self._drafted:
            began = self.clock.now()
            self._proposals.ask(self.drafter, self._seats.running)
            self.busy += self.clock.now() - began
            self._drafted = True
        return self.clock.now()

    def begin(self) -> Leap | None:
        """The next iteration, and those that repeat it, begin now; None when there is nothing to do. `end` must follow."""
        self.draft()
        self._drafted = False
        if not self._seats.running and not self._seats.waiting:
            return None
        began = self.clock.now()
        foreseen = self.stats.foreseen_schedules
        plan = self._apply(*self._decide())
        if self._foresees:
            return self._begun_ahead(plan, began, self.stats.foreseen_schedules > foreseen)
        same = self._repeating
        if same is None or not (only_decodes(plan, self._seats.running) and same.repeats(self._state(), plan.schedule)):
            return Leap(plan, began, np.array([began + self.virtual.duration(plan)], dtype=np.int64))
        count = first_end(plan.requests)
        if self._sharing and self._seats.waiting:
            count = min(count, first_full(plan, self.limits.block_size))
        if count > 1:
            count = affordable(plan.requests, self.limits, count, self._memory.pool.free_count)
        return Leap(plan, began, began + self.virtual.durations(plan, count).cumsum())

    def _begun_ahead(self, plan: Plan, began: int, ahead: bool) -> Leap:
        """The next schedule is made when this iteration begins, as the real engine does beside its executor: who comes later is not in it."""
        with suppress(Exception):  # a policy's defect shows when it is asked again
            self._foreseen = foresee(self.policy, plan, self._state())
        return Leap(plan, began, np.array([began + self.virtual.duration(plan, ahead=ahead)], dtype=np.int64))

    def end(self, leap: Leap, count: int | None = None) -> None:
        """The first `count` iterations of a leap (by default all) are over, and it is the time at which the last of them ends."""
        plan, ends = leap.plan, leap.ends if count is None else leap.ends[:count]
        start, end = leap.start, int(ends[-1])
        self.busy += end - start
        if self._recorder is not None:
            self._recorder.waited(plan, ends)
        if len(ends) > 1:
            times = [start, *ends.tolist()]
            plan, start = self._repeat(plan, times), times[-2]
        self.virtual_clock.advance_to(end)
        outcome = self.virtual.outcome(plan, start, end)
        verify_outcome(outcome, plan)
        self._collect(plan, outcome)
        self._times.note(plan.schedule.tokens, end - start)
        self._return_batch()
        if self._outbox.waiting:
            self._outbox.deliver()

    def step(self) -> bool:
        leap = self.begin()
        if leap is not None:
            self.end(leap)
        return leap is not None

    def _repeat(self, plan: Plan, times: Sequence[int]) -> Plan:
        """All iterations between `times` but the last, whose plan it gives."""
        requests, last = plan.requests, len(times) - 2
        computed = [entry.start for entry in plan.schedule.entries]
        used = self._move_blocks(requests, computed, last)
        self._history.repeated(plan, times[:-1], used)
        entries: list[Entry] = []
        for request, start in zip(requests, computed, strict=True):
            request.computed = start + last
            request.last_token = times[-2]
            entries.append(Entry(request.id, start + last, 1, True, len(request.blocks), Reason.DECODE))
        self.stats.generated_tokens += last * len(requests)
        for place in range(max(0, last - KEPT), last):
            self._times.note(len(requests), times[place + 1] - times[place])
        self._index += last
        schedule = Schedule(plan.schedule.index + last, tuple(entries), (), plan.schedule.held)
        return Plan(schedule, requests, self._tables(requests))

    def _move_blocks(self, requests: Sequence[Request], computed: Sequence[int], last: int) -> list[int]:
        """What iterations 0 to `last` do to tokens and blocks, but what the last one does at its end; used blocks while each of those before it ran.

        In the order of stepping: a block may be named, evicted and found again within a leap. Only a trace wants to know of used blocks, and
        without it and the prefix cache nobody asks who took which block first.
        """
        size, pool, used, traced = self.limits.block_size, self._memory.pool, list[int](), self._history.trace is not None
        for request in requests:
            request.output += self.virtual.tokens(request, last)
        if not traced and not self._sharing:
            for request, start in zip(requests, computed, strict=True):  # the last iteration computes the token at start + last
                blocks = (start + last) // size + 1
                if blocks > len(request.blocks):
                    self._memory.grow(request, blocks)
            return used
        moves: list[tuple[int, bool, int]] = []
        for place, (request, start) in enumerate(zip(requests, computed, strict=True)):
            moves += [(i, False, place) for i in growths(request, start + 1, size, last + 1)]
            if self._sharing:  # iteration i ends with start + 1 + i tokens computed
                moves += [(i, True, place) for i in range(-(start + 1) % size, last, size)]
        moves.sort()
        for iteration, full, place in moves:
            if traced:
                used += [pool.used_count] * (iteration + full - len(used))
            request = requests[place]
            if full:
                request.computed = computed[place] + 1 + iteration
                self._memory.keep(request)
            else:
                self._memory.grow(request, len(request.blocks) + 1)
        return used + [pool.used_count] * (last - len(used)) if traced else used

    def _tables(self, requests: Sequence[Request]) -> tuple[Sequence[int], ...]:
        return ()  # nobody reads them

    def _begin(self, request: Request, start: int) -> Hit:
        if request.first_scheduled is None:
            self.queued_tokens -= len(request.prompt)
        return super()._begin(request, start)

    def _finish(self, request: Request, reason: FinishReason, at: int, error: Exception | None = None, event: Event | None = None) -> None:
        super()._finish(request, reason, at, error, event)
        if request.first_scheduled is None:
            self.queued_tokens -= len(request.prompt)
        if self._recorder is not None:
            self._recorder.ended(request)


def replay(engine: VirtualEngine, requests: Iterable[Request]) -> None:
    """Run `requests`, in the order of their `arrival` (ns), to their end; each is submitted when it is that time, or as soon as an iteration then running ends.

    They are taken one by one, so that a workload need not be in memory. Raises InputError for one that arrives before the one before it.
    """
    clock, coming = engine.virtual_clock, in_order(requests)
    following = next(coming, None)
    while True:
        drafted = engine.draft()
        while following is not None and following[0] <= drafted:
            engine.submit(following[1])
            following = next(coming, None)
        leap = engine.begin()
        if leap is not None:
            engine.end(leap, leap.until(following[0]) if following is not None else None)
        elif following is not None:
            clock.advance_to(following[0])
        else:
            engine.check()
            return
