"""A pipeline carried out on this machine: threads and processes ahead of the consumer, the order always that of the plain loop.

Every element travels with the position after it: a JSON value from which the rest of the epoch follows exactly, whatever was read ahead
of it. So a run is saved between any two elements and resumed with other parallelism, buffers or workers.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Final

import numpy as np

from armillary.core.errors import ArmillaryError, InputError
from armillary.core.trace import Trace
from armillary.data.executors.workers import Call, Closed, Workers
from armillary.data.pipeline import Batch, Filter, Interleave, Map, Pipeline, Prefetch, Shuffle
from armillary.data.policies.autotune import CONSUMER, Cost, Limits, Prediction, autotune, predict

FIRST_TUNING: Final = 8  # outputs after which AUTO is decided for the first time; then after twice as many, and so on
Item = tuple[Any, Any]  # an element, and the position after it


class OperatorError(ArmillaryError):
    """An operator's function failed; the cause is chained."""


class LocalExecutor:
    """Runs pipelines; `limits` bounds what AUTO may use. With a trace, every call of every operator is a span in it."""

    def __init__(self, limits: Limits | None = None, trace: Trace | None = None) -> None:
        self.limits, self.trace = limits or Limits(), trace

    def run(
        self, pipeline: Pipeline, epoch: int = 0, state: Mapping[str, Any] | None = None, numbers: Mapping[str, int] | None = None
    ) -> Run:
        """One epoch's elements, from the beginning or from where a run of the same pipeline was saved.

        `numbers` are what AUTO begins with, such as an earlier run's `tuned()`; without them it begins with 1. Raises `InputError` for a
        state of another pipeline or epoch.
        """
        return Run(pipeline, epoch, state, self.limits, self.trace, numbers or {})


class Run(Iterator[Any]):
    """An epoch in progress: iterate over it. Use it as a context, or call `close`, when it may be left before its end."""

    def __init__(
        self,
        pipeline: Pipeline,
        epoch: int,
        state: Mapping[str, Any] | None,
        limits: Limits,
        trace: Trace | None,
        numbers: Mapping[str, int],
    ) -> None:
        self._closed = True  # until everything is built
        self.pipeline, self.epoch, self._limits, self._trace = pipeline, epoch, limits, trace
        self.outputs, position = 0, None
        if state is not None:
            saved = {"version": state.get("version"), "pipeline": state.get("pipeline"), "epoch": state.get("epoch")}
            mine = {"version": 1, "pipeline": pipeline.order(), "epoch": epoch}
            if differing := [key for key in mine if mine[key] != saved[key]]:
                raise InputError(
                    f"the saved position is of another {differing[0]}: {str(saved[differing[0]])[:200]}, not {str(mine[differing[0]])[:200]}",
                    "resume with the pipeline and the epoch that were saved",
                )
            position, self.outputs = state.get("position"), int(state.get("outputs", 0))
        self._position = position
        self.numbers: dict[str, int] = {name: value or numbers.get(name, 1) for name, value in pipeline.knobs().items()}
        pipeline.tuned(self.numbers)  # bounds are checked
        self._next_tuning = FIRST_TUNING
        self._nodes: list[_Node] = []
        self._left = 0  # when the consumer was last given something, ns; 0 before that
        self._thinking, self._waited, self._started = 0, 0, 0  # ns; `_started` counts this run's own outputs
        self._closed = False
        try:
            self._last = _build(self, len(pipeline.operators), position)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        asked = time.perf_counter_ns()
        if self._left:
            self._thinking += asked - self._left
        try:
            value, self._position = self._last.next()
        except BaseException:
            self.close()
            raise
        self._left = time.perf_counter_ns()
        self._waited += self._left - asked
        if self._trace is not None:
            self._trace.add(CONSUMER, "wait", asked, self._left)
        self.outputs, self._started = self.outputs + 1, self._started + 1
        if self._started == self._next_tuning:
            self._tune()
        return value

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers. Returns at once, or within a second where a call is in progress, which then ends on its own."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + 1
        for thread in [thread for node in self._nodes for thread in node.close()]:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def state_dict(self) -> dict[str, Any]:
        """JSON data: the position after the last element that was given. Raises `InputError` where an unordered map has no position."""
        for operator in self.pipeline.operators:
            if isinstance(operator, Map) and not operator.ordered:
                raise InputError(f"operator {operator.name!r} gives its elements in no fixed order", "use ordered=True to save a position")
        order = self.pipeline.order()
        return {"version": 1, "pipeline": order, "epoch": self.epoch, "outputs": self.outputs, "position": self._position}

    def costs(self) -> dict[str, Cost]:
        """What was measured so far, for `policies.autotune` and for the virtual executor."""
        return {node.name: node.cost() for node in self._nodes}

    @property
    def consumer(self) -> float:
        """ns that the consumer took an output."""
        return self._thinking / max(1, self._started - 1)

    @property
    def stalled(self) -> float:
        """The share of the consumer's time that it waited for input."""
        return self._waited / max(1, self._waited + self._thinking)

    def prediction(self) -> Prediction:
        """The model of this run as it is now: its table names the bottleneck."""
        return predict(self.pipeline.tuned(self.numbers), self.costs(), self.consumer)

    def tuned(self) -> dict[str, int]:
        """What the autotuner makes of this run's costs: numbers for `LocalExecutor.run` to begin the next epoch with."""
        return autotune(self.pipeline, self.costs(), self.consumer, self._limits) if self._started > 1 else dict(self.numbers)

    def _tune(self) -> None:
        self._next_tuning *= 2
        if self.pipeline.automatic():
            chosen = self.tuned()
            self.numbers |= chosen
            for node in self._nodes:
                if node.name in chosen:
                    node.resize(chosen[node.name])


class _Node:
    """One operator at work. `next` gives an item or raises StopIteration; only one thread asks it."""

    def __init__(self, run: Run, name: str, kind: str) -> None:
        self.run, self.name, self.kind = run, name, kind
        self.calls, self.busy, self.bytes = 0, 0, 0.0  # busy: ns inside the operator's own work
        run._nodes.append(self)

    def next(self) -> Item:
        raise NotImplementedError

    def resize(self, number: int) -> None:
        """A new parallelism or depth."""

    def close(self) -> list[threading.Thread]:
        return []

    def cost(self) -> Cost:
        return Cost(each=self.busy / max(1, self.calls), bytes=self.bytes)

    def call(self, function: Callable[[Any], Any], value: Any) -> Any:
        """The operator's function, timed, its errors named."""
        start = time.perf_counter_ns()
        try:
            result = function(value)
        except Exception as error:
            raise self.failed(error) from error
        self.note(start, time.perf_counter_ns(), result)
        return result

    def note(self, start: int, end: int, result: Any, lane: str = "") -> None:
        self.busy += end - start
        self.calls += 1
        if self.calls & (self.calls - 1) == 0:  # at 1, 2, 4, ...: sizes vary less than times
            self.bytes = _nbytes(result)
        if self.run._trace is not None:
            self.run._trace.add(lane or self.name, self.kind, start, end)

    def failed(self, error: Exception) -> OperatorError:
        if isinstance(error, OperatorError):
            return error
        place = f"operator {self.name!r} ({self.kind}) failed on element {self.calls} of epoch {self.run.epoch}"
        told = str(error) if isinstance(error, ArmillaryError) else f"{type(error).__name__}: {error}"
        return OperatorError(f"{place}: {told[:1000]}", "correct its function or the element")


class _SourceNode(_Node):
    """Position: elements read."""

    def __init__(self, run: Run, position: Any) -> None:
        super().__init__(run, run.pipeline.source.name, "source")
        self.read = _count(position)
        self._values: Iterator[Any] | None = None

    def next(self) -> Item:
        start = time.perf_counter_ns()
        try:
            if self._values is None:
                self._values = _skipped(self.run.pipeline.source.open(), self.read)
            value = next(self._values)
        except StopIteration:
            raise
        except Exception as error:
            raise self.failed(error) from error
        self.note(start, time.perf_counter_ns(), value)
        self.read += 1
        return value, self.read


class _MapNode(_Node):
    """A map in its consumer's thread."""

    def __init__(self, run: Run, operator: Map, upstream: _Node) -> None:
        super().__init__(run, operator.name, "map")
        self.function, self.upstream = operator.function, upstream

    def next(self) -> Item:
        value, position = self.upstream.next()
        return self.call(self.function, value), position


class _FilterNode(_Node):
    def __init__(self, run: Run, operator: Filter, upstream: _Node) -> None:
        super().__init__(run, operator.name, "filter")
        self.function, self.upstream, self.kept = operator.function, upstream, 0

    def next(self) -> Item:
        while True:
            value, position = self.upstream.next()
            if self.call(self.function, value):
                self.kept += 1
                return value, position

    def cost(self) -> Cost:
        return replace(super().cost(), keep=max(self.kept, 1) / max(self.calls, 1))


class _BatchNode(_Node):
    def __init__(self, run: Run, operator: Batch, upstream: _Node) -> None:
        super().__init__(run, operator.name, "batch")
        self.operator, self.upstream = operator, upstream

    def next(self) -> Item:
        values: list[Any] = []
        position = None
        while len(values) < self.operator.size:
            try:
                value, position = self.upstream.next()
            except StopIteration:
                if not values or self.operator.drop_remainder:
                    raise
                break
            values.append(value)
        return self.call(self.operator.function, values), position


class _ShuffleNode(_Node):
    """Position: [position before the window, number of the window, elements of it that were given]."""

    def __init__(self, run: Run, operator: Shuffle, build: Callable[[Any], _Node], position: Any) -> None:
        super().__init__(run, operator.name, "shuffle")
        self.operator = operator
        saved: list[Any] = position if isinstance(position, list) and len(position) == 3 else [None, 0, 0]
        self.before, self.number, self.given = saved[0], _count(saved[1]), _count(saved[2])
        self.upstream = build(self.before)
        self.window: list[Any] | None = None
        self.after: Any = None

    def next(self) -> Item:
        if self.window is None:
            self._fill()
        if self.window is not None and self.given == len(self.window):
            self.before, self.number, self.given = self.after, self.number + 1, 0
            self._fill()
        if not self.window:
            raise StopIteration
        value = self.window[self.given]
        self.window[self.given] = None  # the consumer's alone
        self.given, self.calls = self.given + 1, self.calls + 1
        return value, [self.before, self.number, self.given]

    def _fill(self) -> None:
        items = list(islice(_Items(self.upstream), self.operator.window))
        if items:
            self.after = items[-1][1]
        draw = np.random.default_rng([self.operator.seed, self.run.epoch, self.number])
        self.window = [items[index][0] for index in draw.permutation(len(items)).tolist()]


class _Items(Iterator[Item]):
    """A node as an iterator."""

    def __init__(self, node: _Node) -> None:
        self.node = node

    def __next__(self) -> Item:
        return self.node.next()


class _PrefetchNode(_Node):
    """A thread that fills a buffer of at most `depth` elements, the one being made included."""

    def __init__(self, run: Run, operator: Prefetch, upstream: _Node) -> None:
        super().__init__(run, operator.name, "prefetch")
        self.depth, self.upstream = run.numbers[operator.name], upstream
        self.buffer: deque[Item | BaseException] = deque()
        self.changed = threading.Condition()
        self.closed, self.making = False, 0
        self.thread = threading.Thread(target=self._fill, name=self.name, daemon=True)

    def next(self) -> Item:
        with self.changed:
            if self.thread.ident is None and not self.closed:
                self.thread.start()
            self.changed.wait_for(lambda: self.buffer or self.closed)
            if self.closed:
                raise StopIteration
            item = self.buffer.popleft()
            if isinstance(item, BaseException):
                self.buffer.append(item)  # it is the last: asked again, it is the answer again
                raise item
            self.calls += 1
            if self.calls & (self.calls - 1) == 0:
                self.bytes = _nbytes(item[0])
            self.changed.notify_all()
        return item

    def resize(self, number: int) -> None:
        with self.changed:
            self.depth = number
            self.changed.notify_all()

    def close(self) -> list[threading.Thread]:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        return [self.thread]

    def _fill(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: len(self.buffer) < self.depth or self.closed)
                if self.closed:
                    return
            try:
                item: Item | BaseException = self.upstream.next()
            except Closed:
                return
            except BaseException as error:  # StopIteration too: the end goes to the consumer as an element does
                item = error
            with self.changed:
                self.buffer.append(item)
                self.changed.notify_all()
            if isinstance(item, BaseException):
                return


class _ParallelMapNode(_Node):
    """As many workers as the window has places, and a thread that reads one element beyond it."""

    def __init__(self, run: Run, operator: Map, upstream: _Node) -> None:
        super().__init__(run, operator.name, "map")
        self.ordered, self.upstream = operator.ordered, upstream
        self.changed = threading.Condition()
        self.window: deque[tuple[Call, Any] | BaseException] = deque()
        self.workers = Workers(operator.function, operator.name, processes=operator.workers == "process", done=self._woken)
        self.workers.limit = run.numbers[operator.name]
        self.closed = False
        self.thread = threading.Thread(target=self._read, name=f"{self.name} reader", daemon=True)

    def next(self) -> Item:
        with self.changed:
            if self.thread.ident is None and not self.closed:
                self.thread.start()
            self.changed.wait_for(lambda: self._ready() is not None or self.closed)
            if self.closed:
                raise StopIteration
            index = self._ready() or 0
            chosen = self.window[index]
            if isinstance(chosen, BaseException):
                raise chosen  # the end of the input, and what went before it is given: it stays
            del self.window[index]
            self.changed.notify_all()
        call, position = chosen
        try:
            value = call.wait()
        except Closed:
            raise StopIteration from None
        except Exception as error:
            raise self.failed(error) from error
        now = time.perf_counter_ns()
        self.note(now - call.elapsed, now, value, lane=f"{self.name} {self.calls % self.workers.limit}")
        return value, position

    def resize(self, number: int) -> None:
        with self.changed:
            self.workers.limit = number
            self.changed.notify_all()

    def close(self) -> list[threading.Thread]:
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        return [self.thread, *self.workers.close()]

    def _ready(self) -> int | None:
        """The place in the window of what is to be given next: the oldest, or the first that is done."""
        for index, entry in enumerate(self.window):
            if isinstance(entry, BaseException):
                return index if index == 0 else None
            if entry[0].finished:
                return index
            if self.ordered:
                return None
        return None

    def _woken(self) -> None:
        with self.changed:
            self.changed.notify_all()

    def _read(self) -> None:
        while True:
            try:
                item: Item | BaseException = self.upstream.next()
            except Closed:
                return
            except BaseException as error:
                item = error
            with self.changed:
                # Read first, then wait: a worker that is free again has its next element at once.
                self.changed.wait_for(lambda: len(self.window) < self.workers.limit or self.closed)
                if self.closed:
                    return
                if isinstance(item, BaseException):
                    self.window.append(item)
                else:
                    try:
                        self.window.append((self.workers.submit(item[0]), item[1]))
                    except Closed:
                        return
                self.changed.notify_all()
            if isinstance(item, BaseException):
                return


class _Turn:
    """An iterable in its place of an interleave: where its element came from, and how much of it was given."""

    def __init__(self, before: Any, value: Any, given: int) -> None:
        self.before, self.value, self.given = before, value, given
        self.values: Iterator[Any] | None = None
        self.opening = 0  # ns
        self.block: Call | None = None  # the block that was asked for, (values, has it ended)


class _InterleaveNode(_Node):
    """Position: the source's position after the last element that was taken; each place's [position before its element, elements given];
    whose turn it is, and how much of its block was given."""

    def __init__(self, run: Run, operator: Interleave, build: Callable[[Any], _Node], position: Any) -> None:
        super().__init__(run, operator.name, "interleave")
        self.operator, self.build, self.saved = operator, build, position
        saved = position if isinstance(position, dict) else None
        self.outer: Any = saved["outer"] if saved else None
        self.upstream = build(self.outer)
        self.places: list[_Turn | None] | None = None
        self.at, self.used = (int(saved["at"]), int(saved["used"])) if saved else (0, 0)
        self.values: deque[Any] = deque()  # what is left of the block whose turn it is
        self.asked, self.ended = False, False  # was this turn's block taken; has its iterable ended
        self.opened, self.opening = 0, 0
        self.workers = None if operator.parallelism == 1 else Workers(self._read_block, operator.name, processes=False)
        if self.workers is not None:
            self.workers.limit = min(run.numbers[operator.name], operator.cycle)

    def next(self) -> Item:
        if self.places is None:
            self._fill()
        assert self.places is not None
        while any(place is not None for place in self.places):
            place = self.places[self.at]
            if place is not None:
                if not self.asked:
                    self._take(place)
                if self.values:
                    value = self.values.popleft()
                    place.given, self.used = place.given + 1, self.used + 1
                    if not self.values and not self.ended and self.workers is not None:
                        self._ask(place, self.operator.block)  # now, so that it is read while the consumer works
                    return value, self._position()
                if self.ended:
                    place = self.places[self.at] = self._refill()
                if place is not None and place.block is None:
                    self._ask(place, self.operator.block)
            self.at, self.used, self.asked = (self.at + 1) % self.operator.cycle, 0, False
        raise StopIteration

    def resize(self, number: int) -> None:
        if self.workers is not None:
            self.workers.limit = min(number, self.operator.cycle)

    def close(self) -> list[threading.Thread]:
        return [] if self.workers is None else self.workers.close()

    def cost(self) -> Cost:
        opened = max(1, self.opened)
        return Cost(each=self.busy / max(1, self.calls), open=self.opening / opened, inner=max(self.calls, 1) / opened, bytes=self.bytes)

    def _fill(self) -> None:
        """Every place's iterable, the first ones or those that were saved."""
        if self.saved is None:
            self.places = [self._refill() for _ in range(self.operator.cycle)]
        else:
            self.places = []
            for saved in self.saved["places"]:
                self.places.append(None if saved is None else _Turn(saved[0], self._element(saved[0]), _count(saved[1])))
        for index, place in enumerate(self.places):
            if place is not None:
                self._ask(place, self.operator.block - (self.used if index == self.at else 0))

    def _element(self, before: Any) -> Any:
        """The element after a position, by nodes that are gone again."""
        nodes = self.run._nodes
        first = len(nodes)
        value = self.build(before).next()[0]
        for node in nodes[first:]:
            node.close()
        del nodes[first:]
        return value

    def _refill(self) -> _Turn | None:
        before = self.outer
        try:
            value, self.outer = self.upstream.next()
        except StopIteration:
            return None
        return _Turn(before, value, 0)

    def _ask(self, place: _Turn, count: int) -> None:
        """The next `count` elements of the place: asked of a worker now, or left until its turn."""
        if self.workers is not None:
            place.block = self.workers.submit((place, count))
        else:
            place.block = Call((place, count))

    def _take(self, place: _Turn) -> None:
        assert place.block is not None
        try:
            values, self.ended, elapsed = place.block.wait() if self.workers is not None else self._read_block(place.block.argument)
        except Closed:
            raise StopIteration from None
        except Exception as error:
            raise self.failed(error) from error
        self.values, place.block, self.asked = deque(values), None, True
        if place.opening:
            self.opened, self.opening, place.opening = self.opened + 1, self.opening + place.opening, 0
        self.busy += elapsed
        self.calls += len(self.values)
        if self.values:
            self.bytes = _nbytes(self.values[0])
        if self.run._trace is not None:
            now = time.perf_counter_ns()
            self.run._trace.add(f"{self.name} {self.at}", self.kind, now - elapsed, now)

    def _read_block(self, argument: tuple[_Turn, int]) -> tuple[list[Any], bool, int]:
        """(elements, has the iterable ended, ns): an iterable ends with the block that it cannot fill."""
        place, count = argument
        start = time.perf_counter_ns()
        if place.values is None:
            place.values = _skipped(self.operator.function(place.value), place.given)
            place.opening = max(1, time.perf_counter_ns() - start)
            start = time.perf_counter_ns()
        values = list(islice(place.values, count))
        return values, len(values) < count, time.perf_counter_ns() - start

    def _position(self) -> dict[str, Any]:
        assert self.places is not None
        places = [None if place is None else [place.before, place.given] for place in self.places]
        return {"outer": self.outer, "places": places, "at": self.at, "used": self.used}


def _build(run: Run, count: int, position: Any) -> _Node:
    """The node of the first `count` operators, at a position."""
    if count == 0:
        return _SourceNode(run, position)
    operator = run.pipeline.operators[count - 1]

    def upstream(position: Any) -> _Node:
        return _build(run, count - 1, position)

    if isinstance(operator, Shuffle):
        return _ShuffleNode(run, operator, upstream, position)
    if isinstance(operator, Interleave):
        return _InterleaveNode(run, operator, upstream, position)
    below = upstream(position)
    if isinstance(operator, Prefetch):
        return _PrefetchNode(run, operator, below)
    if isinstance(operator, Batch):
        return _BatchNode(run, operator, below)
    if isinstance(operator, Filter):
        return _FilterNode(run, operator, below)
    if operator.parallelism == 1 and operator.workers == "thread":
        return _MapNode(run, operator, below)
    return _ParallelMapNode(run, operator, below)


def _skipped(values: Any, count: int) -> Iterator[Any]:
    """An iterable from its element `count` on."""
    if isinstance(values, Sequence):
        return (values[index] for index in range(count, len(values)))
    iterator: Iterator[Any] = iter(values)
    deque(islice(iterator, count), maxlen=0)
    return iterator


def _count(position: Any) -> int:
    if position is None:
        return 0
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise InputError(f"the saved position has {str(position)[:40]!r} where a count is", "take it from a whole checkpoint")
    return position


def _nbytes(value: Any) -> float:
    """About how much memory an element takes."""
    if hasattr(value, "nbytes"):
        return float(value.nbytes)
    if isinstance(value, list | tuple) and value:
        return len(value) * _nbytes(value[0])
    if isinstance(value, dict):
        return float(sum(map(_nbytes, value.values())))
    return float(sys.getsizeof(value))
