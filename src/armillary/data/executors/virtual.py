"""A pipeline in virtual time: when each output is ready and taken, from costs alone, by the rules that the local executor follows.

Every node answers one question, "asked at time t, when do you give your next element?", and keeps the clocks of its own threads. So an
epoch is simulated element by element without an event queue, exactly: a bounded buffer of d elements begins to make element i when
element i - 1 is made and element i - d has been taken, and both are known by the time element i is asked for.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.data.pipeline import Batch, Filter, Interleave, Map, Operator, Pipeline, Prefetch, Shuffle
from armillary.data.policies.autotune import CONSUMER, Cost

MAX_ELEMENTS: Final = 10_000_000


@dataclass(frozen=True, slots=True)
class VirtualRun:
    """`time` ns of all epochs, outputs in all, ns that the consumer waited, and the spans."""

    time: int
    outputs: int
    stalled: int
    trace: Trace


class VirtualExecutor:
    """Runs pipelines of `elements` source elements an epoch; costs are constants, waits of different threads do not slow each other."""

    def __init__(self, costs: Mapping[str, Cost], elements: int, consumer: float = 0.0) -> None:
        if not 0 <= elements <= MAX_ELEMENTS:
            raise InputError(f"an epoch of {elements:,} elements is outside 0 .. {MAX_ELEMENTS:,}", "simulate a shorter one")
        self.costs, self.elements, self.consumer = costs, elements, round(consumer)

    def run(self, pipeline: Pipeline, epochs: int = 1) -> VirtualRun:
        """Epochs one after another, each from an empty pipeline, as a training loop runs them."""
        if waiting := pipeline.automatic():
            raise InputError(f"operator {waiting[0]!r} has no number yet", "tune the pipeline first")
        trace = Trace("input pipeline, virtual time")
        now, outputs, stalled = 0, 0, 0
        for _ in range(epochs):
            node: _Node = _Source(pipeline.source.name, self.costs[pipeline.source.name], self.elements, now, trace)
            for operator in pipeline.operators:
                node = _node(operator, self.costs[operator.name], node, now, trace)
            while (ready := node.next(now)) is not None:
                if ready > now:
                    trace.add(CONSUMER, "wait", now, ready)
                    stalled += ready - now
                trace.add(CONSUMER, "train", ready, ready + self.consumer)
                now, outputs = ready + self.consumer, outputs + 1
        return VirtualRun(now, outputs, stalled, trace)


class _Node:
    """`next(now)`: the instant at which the next element is in the asker's hands; None when there is none. Never asked twice at once."""

    def next(self, now: int) -> int | None:
        raise NotImplementedError


class _Source(_Node):
    def __init__(self, name: str, cost: Cost, elements: int, start: int, trace: Trace) -> None:
        self.name, self.cost, self.left, self.opened, self.trace = name, cost, elements, False, trace

    def next(self, now: int) -> int | None:
        begin = now
        if not self.opened:
            self.opened = True
            now += round(self.cost.open)
            self.trace.add(self.name, "open", begin, now)
        if not self.left:
            return None
        self.left -= 1
        end = now + round(self.cost.each)
        self.trace.add(self.name, "read", now, end)
        return end


class _Inline(_Node):
    """A map without workers, and whatever else one call of a function is."""

    def __init__(self, operator: Operator, cost: Cost, upstream: _Node, trace: Trace) -> None:
        self.name, self.kind = operator.name, type(operator).__name__.lower()
        self.cost, self.upstream, self.trace = cost, upstream, trace

    def next(self, now: int) -> int | None:
        begin = self.upstream.next(now)
        return None if begin is None else self.call(begin)

    def call(self, begin: int) -> int:
        end = begin + round(self.cost.each)
        self.trace.add(self.name, self.kind, begin, end)
        return end


class _Filter(_Inline):
    """Keeps every 1 / keep-th element, evenly."""

    seen = 0

    def next(self, now: int) -> int | None:
        while (end := super().next(now)) is not None:
            before, self.seen = self.seen, self.seen + 1
            if int(self.seen * self.cost.keep + 1e-9) > int(before * self.cost.keep + 1e-9):
                return end
            now = end
        return None


class _Group(_Inline):
    """A batch, or the window of a shuffle: `size` elements, then the call."""

    def __init__(self, operator: Batch | Shuffle, cost: Cost, upstream: _Node, trace: Trace) -> None:
        super().__init__(operator, cost, upstream, trace)
        self.size = operator.size if isinstance(operator, Batch) else operator.window
        self.drop = isinstance(operator, Batch) and operator.drop_remainder
        self.scatter = isinstance(operator, Shuffle)
        self.held = 0

    def next(self, now: int) -> int | None:
        if self.held:
            self.held -= 1
            return now
        count = 0
        while count < self.size and (ready := self.upstream.next(now)) is not None:
            now, count = ready, count + 1
        if not count or (self.drop and count < self.size):
            return None
        self.held = count - 1 if self.scatter else 0
        return self.call(now)


class _Prefetch(_Node):
    """One thread that makes at most `depth` elements ahead."""

    def __init__(self, depth: int, upstream: _Node, start: int) -> None:
        self.depth, self.upstream, self.made = depth, upstream, start
        self.taken: list[int] = []  # of the last `depth` elements

    def next(self, now: int) -> int | None:
        begin = max(self.made, self.taken[0]) if len(self.taken) == self.depth else self.made
        made = self.upstream.next(begin)
        if made is None:
            return None
        self.made = made
        self.taken = [*self.taken[-self.depth + 1 :], max(now, made)] if self.depth > 1 else [max(now, made)]
        return max(now, made)


class _Parallel(_Node):
    """As many workers as the window has places, and a thread that reads one element beyond it."""

    def __init__(self, operator: Map, cost: Cost, upstream: _Node, start: int, trace: Trace) -> None:
        self.operator, self.cost, self.upstream, self.trace = operator, cost, upstream, trace
        self.workers = operator.parallelism or 1
        self.begun = start  # when the last call began, and the next read with it
        self.slots = [start] * self.workers  # when each place of the window is free
        self.waiting: list[tuple[int, int]] = []  # (ready, number) of what is in the window
        self.number, self.ended = 0, False

    def next(self, now: int) -> int | None:
        while self.slots and not self.ended:
            read = self.upstream.next(self.begun)
            if read is None:
                self.ended = True
                break
            self.begun = begin = max(read, heapq.heappop(self.slots))
            end = begin + round(self.cost.each)
            self.trace.add(f"{self.operator.name} {self.number % self.workers}", "map", begin, end)
            self.waiting.append((end, self.number))
            self.number += 1
        if not self.waiting:
            return None
        chosen = self.waiting[0] if self.operator.ordered else min(self.waiting)
        self.waiting.remove(chosen)
        taken = max(now, chosen[0])
        heapq.heappush(self.slots, taken)
        return taken


class _Interleave(_Node):
    """`cycle` iterables in turns. With workers, each is asked for its next block as soon as the last one is used up; otherwise when it is
    its turn. An iterable that ends gives its place to the next one, which is read from its next turn on."""

    def __init__(self, operator: Interleave, cost: Cost, upstream: _Node, trace: Trace) -> None:
        self.operator, self.cost, self.upstream, self.trace = operator, cost, upstream, trace
        workers = operator.parallelism or 1
        self.free = [0] * workers if workers > 1 else None  # when each worker is
        self.left = [0] * operator.cycle  # elements that each iterable still has
        self.closed = [True] * operator.cycle  # not opened yet: its next block begins with that
        self.live = [True] * operator.cycle
        self.block: list[tuple[int, int] | None] = [None] * operator.cycle  # (elements, when they are ready), None: not asked for
        self.at, self.used, self.opened, self.filled = 0, 0, 0, False
        self.following = False  # the block of this turn is used up and the next one asked for

    def next(self, now: int) -> int | None:
        if not self.filled:
            self.filled = True
            for slot in range(self.operator.cycle):
                now = self._refill(slot, now)
                if self.free is not None:
                    self._fetch(slot, now)
        while any(self.live):
            slot = self.at
            if self.live[slot] and not self.following:
                if self.block[slot] is None:
                    self._fetch(slot, now)
                count, ready = self.block[slot] or (0, 0)
                now = max(now, ready)
                if self.used < count:
                    self.used += 1
                    if self.used == self.operator.block and self.free is not None:
                        self.following = True
                        self._fetch(slot, now)
                    return now
                if count < self.operator.block:
                    now = self._refill(slot, now)
                self.block[slot] = None
                if self.free is not None and self.live[slot]:
                    self._fetch(slot, now)
            self.at, self.used, self.following = (slot + 1) % self.operator.cycle, 0, False
        return None

    def _refill(self, slot: int, now: int) -> int:
        """The next iterable in this place; it is opened with its first block."""
        taken = self.upstream.next(now)
        if taken is None:
            self.live[slot] = False
            return now
        # Iterables of the floor and the ceiling of the average, so that the elements add up.
        self.left[slot] = int((self.opened + 1) * self.cost.inner + 1e-9) - int(self.opened * self.cost.inner + 1e-9)
        self.opened, self.closed[slot] = self.opened + 1, True
        return taken

    def _fetch(self, slot: int, asked: int) -> None:
        """The place's next block, begun when a worker is free."""
        begin = asked if self.free is None else max(asked, heapq.heappop(self.free))
        count = min(self.operator.block, self.left[slot])
        end = begin + (round(self.cost.open) if self.closed[slot] else 0) + round(count * self.cost.each)
        self.left[slot], self.closed[slot] = self.left[slot] - count, False
        self.trace.add(f"{self.operator.name} {slot}", "interleave", begin, end)
        self.block[slot] = (count, end)
        if self.free is not None:
            heapq.heappush(self.free, end)


def _node(operator: Operator, cost: Cost, upstream: _Node, start: int, trace: Trace) -> _Node:
    if isinstance(operator, Prefetch):
        return _Prefetch(operator.depth or 1, upstream, start)
    if isinstance(operator, Interleave):
        return _Interleave(operator, cost, upstream, trace)
    if isinstance(operator, Map) and operator.parallelism != 1:
        return _Parallel(operator, cost, upstream, start, trace)
    if isinstance(operator, Filter):
        return _Filter(operator, cost, upstream, trace)
    if isinstance(operator, Batch | Shuffle):
        return _Group(operator, cost, upstream, trace)
    return _Inline(operator, cost, upstream, trace)
