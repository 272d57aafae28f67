"""Operators at work in their consumer's thread. Each gives items: an element, and the position after it.

A position is JSON data. Most operators pass on the position of the element that they were given; the source counts, and a shuffle
remembers where its window began.
"""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from armillary.core.errors import ArmillaryError, InputError
from armillary.data.pipeline import Batch, Filter, Map, Shuffle
from armillary.data.policies.autotune import Cost

if TYPE_CHECKING:
    from armillary.data.executors.local import Run

Item = tuple[Any, Any]  # an element, and the position after it


class OperatorError(ArmillaryError):
    """An operator's function failed; the cause is chained."""


class Node:
    """One operator at work. `next` gives an item or raises StopIteration; only one thread asks it."""

    def __init__(self, run: Run, name: str, kind: str) -> None:
        self.run, self.name, self.kind = run, name, kind
        self.calls, self.busy, self.bytes = 0, 0, 0.0  # busy: ns inside the operator's own work
        run.nodes.append(self)

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
            self.bytes = nbytes(result)
        if self.run.trace is not None:
            self.run.trace.add(lane or self.name, self.kind, start, end)

    def failed(self, error: Exception) -> OperatorError:
        if isinstance(error, OperatorError):
            return error
        place = f"operator {self.name!r} ({self.kind}) failed on element {self.calls} of epoch {self.run.epoch}"
        told = str(error) if isinstance(error, ArmillaryError) else f"{type(error).__name__}: {error}"
        return OperatorError(f"{place}: {told[:1000]}", "correct its function or the element")


class SourceNode(Node):
    """Position: elements read."""

    def __init__(self, run: Run, position: Any) -> None:
        super().__init__(run, run.pipeline.source.name, "source")
        self.read = count(position)
        self._values: Iterator[Any] | None = None

    def next(self) -> Item:
        start = time.perf_counter_ns()
        try:
            if self._values is None:
                self._values = skipped(self.run.pipeline.source.open(), self.read)
            value = next(self._values)
        except StopIteration:
            raise
        except Exception as error:
            raise self.failed(error) from error
        self.note(start, time.perf_counter_ns(), value)
        self.read += 1
        return value, self.read


class MapNode(Node):
    """A map in its consumer's thread."""

    def __init__(self, run: Run, operator: Map, upstream: Node) -> None:
        super().__init__(run, operator.name, "map")
        self.function, self.upstream = operator.function, upstream

    def next(self) -> Item:
        value, position = self.upstream.next()
        return self.call(self.function, value), position


class FilterNode(Node):
    def __init__(self, run: Run, operator: Filter, upstream: Node) -> None:
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


class BatchNode(Node):
    def __init__(self, run: Run, operator: Batch, upstream: Node) -> None:
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


class ShuffleNode(Node):
    """Position: [position before the window, number of the window, elements of it that were given]."""

    def __init__(self, run: Run, operator: Shuffle, build: Callable[[Any], Node], position: Any) -> None:
        super().__init__(run, operator.name, "shuffle")
        self.operator = operator
        saved: list[Any] = position if isinstance(position, list) and len(position) == 3 else [None, 0, 0]
        self.before, self.number, self.given = saved[0], count(saved[1]), count(saved[2])
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

    def __init__(self, node: Node) -> None:
        self.node = node

    def __next__(self) -> Item:
        return self.node.next()


def skipped(values: Any, count: int) -> Iterator[Any]:
    """An iterable from its element `count` on."""
    if isinstance(values, Sequence):
        return (values[index] for index in range(count, len(values)))
    iterator: Iterator[Any] = iter(values)
    deque(islice(iterator, count), maxlen=0)
    return iterator


def count(position: Any) -> int:
    if position is None:
        return 0
    if isinstance(position, bool) or not isinstance(position, int) or position < 0:
        raise InputError(f"the saved position has {str(position)[:40]!r} where a count is", "take it from a whole checkpoint")
    return position


def nbytes(value: Any) -> float:
    """About how much memory an element takes."""
    if hasattr(value, "nbytes"):
        return float(value.nbytes)
    if isinstance(value, list | tuple) and value:
        return len(value) * nbytes(value[0])
    if isinstance(value, dict):
        return float(sum(map(nbytes, value.values())))
    return float(sys.getsizeof(value))
