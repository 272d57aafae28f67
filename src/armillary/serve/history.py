"""What the engine did, kept within bounds: spans for the trace, recent iterations for the page, words for one request."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from armillary.serve.beginnings import Beginnings
from armillary.serve.request import FinishReason, Request
from armillary.serve.schedule import Hit, Plan, Preemption, Reason, Schedule
from armillary.serve.story import Story

if TYPE_CHECKING:
    from armillary.core.trace import Trace

RECENT_ITERATIONS = 240
ENDED_REQUESTS = 256  # stories kept after the end


@dataclass(slots=True)
class EngineStats:
    """Cumulative counters since the engine was made."""

    iterations: int = 0
    foreseen_schedules: int = 0  # of them, how many schedules were made while the iteration before ran
    prompt_tokens: int = 0  # prompts whose computation was completed, once each
    generated_tokens: int = 0
    preemptions: int = 0
    recomputed_tokens: int = 0  # cached tokens that preemption took away
    sought_tokens: int = 0  # tokens of sequences that were admitted and looked for in the prefix cache
    reused_tokens: int = 0  # those of them that it had
    forked_tokens: int = 0  # of prompts that another choice of the same answer had computed
    delivered_tokens: int = 0  # that a prefill worker had computed
    drafted_tokens: int = 0  # proposed and verified ...
    accepted_tokens: int = 0  # ... and right
    failed_iterations: int = 0
    scheduled_tokens: int = 0  # over all iterations
    iteration_sizes: list[int] = field(default_factory=lambda: [0] * 32)  # iterations with over 2^(i-1) and up to 2^i tokens
    finished: dict[FinishReason, int] = field(default_factory=lambda: {"stop": 0, "length": 0, "cancelled": 0, "error": 0})


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration for the live picture; times in ns of the executor's clock."""

    index: int
    entries: tuple[tuple[str, int], ...]  # (request id, tokens)
    tokens: int
    start: int
    end: int
    preempted: tuple[str, ...]
    blocks_used: int


class History:
    """Written by the engine's thread under the engine's lock."""

    def __init__(self, trace: Trace | None, block_size: int, *, told: bool = True) -> None:
        """`told`: whether every request's story is kept and the recent iterations are."""
        self.trace = trace
        self._beginnings = Beginnings(block_size)
        self.told = told
        self.stats = EngineStats()
        self.recent: deque[Iteration] = deque(maxlen=RECENT_ITERATIONS)
        self._stories: dict[str, Story] = {}
        self._ended: OrderedDict[str, Story] = OrderedDict()
        self._left_out: set[str] = set()  # running, but not in the last iteration

    def arrived(self, request: Request, at: int, ahead: int, behind: Reason) -> None:
        """At `at`, which may be later than its arrival. `behind` is why it waits as long as no schedule names it, when there are requests `ahead`."""
        if not self.told:
            return
        assert request.arrival is not None
        story = Story(request.arrival, request.arrival)
        self._stories[request.id] = story
        story.arrived(request, ahead, behind, at)

    def tell(self, request_id: str, at: int, words: str) -> None:
        """Add to the story of a request that has not ended what the schedule does not say."""
        if self.told:
            self._stories[request_id].tell(at, words)

    def preempted(self, request: Request, preemption: Preemption, at: int) -> None:
        self.stats.preemptions += 1
        self.stats.recomputed_tokens += request.computed
        if self.told:
            self._left_out.discard(request.id)
            self._stories[request.id].preempted(request, preemption, at)

    def scheduled(self, schedule: Schedule, admitted: list[Request], hits: Mapping[str, Hit], at: int) -> None:
        """Who was let in, with what, and who was not; called before the iteration runs."""
        if not self.told:
            return
        new = {request.id: request for request in admitted}
        for entry in schedule.entries:
            request = new.get(entry.request_id)
            if request is not None:
                story = self._stories[request.id]
                if request.id in schedule.overdue:
                    story.tell(at, "waited over the bound (--max-wait): goes first, whatever the order")
                if self.trace is not None and at > story.waiting_since:
                    kind = "preempted" if request.preemptions else "queued"
                    self.trace.add(f"request/{request.id}", kind, story.waiting_since, at, str(story.held or ""))
                story.admitted(request, entry, _origin(request, hits[request.id]), at)
            elif entry.reason is not Reason.DECODE or entry.request_id in self._left_out:
                self._left_out.discard(entry.request_id)
                self._stories[entry.request_id].goes_on(entry, at)
        for hold in schedule.held:
            story = self._stories[hold.request_id]
            story.hold(hold.reason, at)
            if story.running:
                self._left_out.add(hold.request_id)

    def began(self, request: Request, hit: Hit, start: int, sought: bool) -> None:
        """An admitted sequence has its first `start` tokens from `hit`; `sought`: it looked for them in the prefix cache."""
        if hit.forked:
            self.stats.forked_tokens += start
        elif hit.delivered:
            self.stats.delivered_tokens += start
        else:
            if sought:
                self.stats.sought_tokens += request.known
            self.stats.reused_tokens += start

    def ran(self, plan: Plan, start: int, end: int, blocks_used: int) -> None:
        """An iteration was carried out."""
        schedule, tokens = plan.schedule, plan.schedule.tokens
        self.stats.iterations += 1
        self.stats.scheduled_tokens += tokens
        self.stats.iteration_sizes[_size_class(tokens)] += 1
        if self.told:
            entries = tuple([(entry.request_id, entry.count) for entry in schedule.entries])
            preempted = tuple([preemption.request_id for preemption in schedule.preempted])
            self.recent.append(Iteration(schedule.index, entries, tokens, start, end, preempted, blocks_used))
        if self.trace is None:
            return
        sizes = {
            "tokens": tokens, "sequences": len(schedule.entries), "blocks_used": blocks_used, "preempted": len(schedule.preempted),
        }  # fmt: skip
        self.trace.add("engine", "step", start, end, "", sizes)
        self.trace.count("kv_blocks", end, {"used": blocks_used})
        for entry in schedule.entries:
            kind = "decode" if entry.reason is Reason.DECODE else "prompt"
            self.trace.add(f"request/{entry.request_id}", kind, start, end, str(entry.reason), {"tokens": entry.count})

    def repeated(self, plan: Plan, times: Sequence[int], blocks_used: Sequence[int]) -> None:
        """The decodes of `plan` were carried out again and again: iteration i from times[i] to times[i + 1] ns, with `blocks_used[i]`."""
        count, tokens = len(times) - 1, plan.schedule.tokens
        self.stats.iterations += count
        self.stats.scheduled_tokens += count * tokens
        self.stats.iteration_sizes[_size_class(tokens)] += count
        if self.trace is None:
            return
        lanes = [f"request/{entry.request_id}" for entry in plan.schedule.entries]
        for (start, end), used in zip(pairwise(times), blocks_used, strict=True):
            self.trace.add("engine", "step", start, end, "", {"tokens": tokens, "sequences": tokens, "blocks_used": used, "preempted": 0})
            self.trace.count("kv_blocks", end, {"used": used})
            for lane in lanes:
                self.trace.add(lane, "decode", start, end, str(Reason.DECODE), {"tokens": 1})

    def failed(self, plan: Plan, error: Exception, start: int, end: int) -> None:
        """An iteration raised."""
        self.stats.failed_iterations += 1
        if self.trace is not None:
            self.trace.add("engine", "error", start, end, f"{type(error).__name__}: {error}", {"tokens": plan.schedule.tokens})

    def finished(self, request: Request, at: int, error: Exception | None) -> None:
        reason = request.finish_reason
        assert reason is not None
        self.stats.finished[reason] += 1
        if self.trace is not None:
            self._record(self.trace, request, at)
        if not self.told:
            return
        self._left_out.discard(request.id)
        story = self._stories.pop(request.id)
        story.ended(request, error, at)
        self._ended[request.id] = story
        while len(self._ended) > ENDED_REQUESTS:
            self._ended.popitem(last=False)

    def _record(self, trace: Trace, request: Request, at: int) -> None:
        """What it takes to ask the same again: `serve.workload.trace_spans` reads it."""
        lane, (earlier, shared) = f"request/{request.id}", self._beginnings.of(request)
        sizes = {"arrival": request.arrival or 0, "prompt": len(request.prompt), "answer": len(request.output), "reused": request.reused}
        trace.add(lane, "ended", at, at, str(request.finish_reason), sizes)
        if shared:
            trace.add(lane, "shares", at, at, earlier, {"shared": shared})

    def held(self, request_id: str) -> Reason | None:
        """Why the request was last held back."""
        story = self._stories.get(request_id)
        return story.held if story is not None else None

    def explain(self, request_id: str) -> list[str] | None:
        """What happened to a request, in words; None when it is unknown or long gone."""
        story = self._stories.get(request_id) or self._ended.get(request_id)
        return story.events() if story is not None else None

    def iterations(self, since: int = -1) -> list[dict[str, Any]]:
        """Recent iterations with an index over `since`, oldest first; shallow, for the engine's lock is held meanwhile."""
        newer: list[dict[str, Any]] = []
        for iteration in reversed(self.recent):
            if iteration.index <= since:
                break
            newer.append({name: getattr(iteration, name) for name in Iteration.__slots__})
        newer.reverse()
        return newer


def _size_class(tokens: int) -> int:
    return min(31, (max(1, tokens) - 1).bit_length())


def _origin(request: Request, hit: Hit) -> str:
    """Who had computed what a sequence begins with."""
    if hit.forked and request.parent is not None:
        return f"'{request.parent.id}'"
    return "the worker that computed them" if hit.delivered else "the prefix cache"
