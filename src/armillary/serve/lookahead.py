"""The next schedule, made while the current iteration runs (NanoFlow's asynchronous scheduling, Zhu et al., OSDI 2025, section 4.4).

It is made for the state that will be if every sequence that samples gets one token and goes on. Whoever ends is left out of it;
where more turns out otherwise it is thrown away and made again, so what is scheduled never rests on a guess, and nothing is
computed for a sequence that has ended.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace

from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Plan, Reason, Schedule, SchedulerPolicy, State


class _OneMore(Sequence[int]):
    """An answer with a token that is not known yet: policies count, they do not read."""

    def __init__(self, output: Sequence[int]) -> None:
        self._output = output
        self._length = len(output) + 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> int:  # type: ignore[override]
        if index >= self._length - 1:
            raise IndexError("this token is being drawn")
        return self._output[index]

    def __iter__(self) -> Iterator[int]:
        return (self[i] for i in range(self._length - 1))


def ahead(request: Request, entry: Entry) -> Request | None:
    """`request` as it will be after `entry`; None when it ends then, as far as its length tells."""
    twin = copy.copy(request)
    twin.computed = entry.start + entry.count
    if entry.sample:
        twin.output = _OneMore(request.output)  # type: ignore[assignment]
    return None if twin.computed >= twin.max_length or len(twin.output) >= max(1, twin.sampling.max_tokens) else twin


def foresee(policy: SchedulerPolicy, plan: Plan, state: State) -> Foreseen:
    """What `policy` decides for the state that follows `state` when `plan`, which is running, ends as expected.

    Blocks that sequences give back by then are not counted as free.
    """
    entries = {entry.request_id: entry for entry in plan.schedule.entries}
    running: list[Request] = []
    for request in state.running:
        entry = entries.get(request.id)
        after = ahead(request, entry) if entry is not None else copy.copy(request)
        if after is not None:
            running.append(after)
    ordered = policy.behind is not Reason.QUEUE_ORDER
    if not running and not state.waiting:
        return Foreseen(Schedule(state.index), (), state.free_blocks, (), ordered)
    schedule = policy.step(replace(state, running=tuple(running)))
    return Foreseen(schedule, running, state.free_blocks, queue(state.waiting, ordered), ordered)


@dataclass(frozen=True, slots=True)
class Foreseen:
    """A schedule and what it was made for. `ordered`: the queue is not served as it stands."""

    schedule: Schedule
    running: Sequence[Request]
    free_blocks: int
    queue: tuple[str | int, ...]
    ordered: bool

    def settled(self, state: State, alive: Container[str]) -> Schedule | None:
        """The schedule as it fits `state`, without those that have ended meanwhile; None when it has to be made again.

        `alive` are the ids of all requests that have not ended.
        """
        now = {request.id: request for request in state.running}
        expected = {request.id: request for request in self.running}
        if not now.keys() <= expected.keys() or (self.schedule.preempted and len(now) < len(expected)):
            return None
        if any((request.known, request.computed) != (expected[name].known, expected[name].computed) for name, request in now.items()):
            return None
        kept = tuple(entry for entry in self.schedule.entries if entry.request_id in now or entry.request_id not in expected)
        admitted = [entry for entry in kept if entry.request_id not in now]
        if not kept or state.free_blocks < self.free_blocks or (admitted and queue(state.waiting, self.ordered) != self.queue):
            return None
        held = tuple(hold for hold in self.schedule.held if hold.request_id in alive)
        return replace(self.schedule, entries=kept, held=held)


def queue(waiting: Sequence[Request], ordered: bool) -> tuple[str | int, ...]:
    """What of the queue an admission rests on: who is first; with an order of its own also who came last, and how many there are."""
    if not waiting:
        return ()
    return (waiting[0].id, waiting[-1].id, len(waiting)) if ordered else (waiting[0].id,)
