"""Operators at work ahead of their consumer, in threads of their own: prefetch, a parallel map, an interleave."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from armillary.data.executors.nodes import Item, Node, count, nbytes, skipped
from armillary.data.executors.workers import Call, Closed, Workers
from armillary.data.pipeline import Interleave, Map, Prefetch
from armillary.data.policies.autotune import Cost

if TYPE_CHECKING:
    from armillary.data.executors.local import Run


class PrefetchNode(Node):
    """A thread that fills a buffer of at most `depth` elements, the one being made included."""

    def __init__(self, run: Run, operator: Prefetch, upstream: Node) -> None:
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
                self.bytes = nbytes(item[0])
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


class ParallelMapNode(Node):
    """As many workers as the window has places, and a thread that reads one element beyond it."""

    def __init__(self, run: Run, operator: Map, upstream: Node) -> None:
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


class InterleaveNode(Node):
    """Position: the source's position after the last element that was taken; each place's [position before its element, elements given];
    whose turn it is, and how much of its block was given."""

    def __init__(self, run: Run, operator: Interleave, build: Callable[[Any], Node], position: Any) -> None:
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
                self.places.append(None if saved is None else _Turn(saved[0], self._element(saved[0]), count(saved[1])))
        for index, place in enumerate(self.places):
            if place is not None:
                self._ask(place, self.operator.block - (self.used if index == self.at else 0))

    def _element(self, before: Any) -> Any:
        """The element after a position, by nodes that are gone again."""
        nodes = self.run.nodes
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
            self.bytes = nbytes(self.values[0])
        if self.run.trace is not None:
            now = time.perf_counter_ns()
            self.run.trace.add(f"{self.name} {self.at}", self.kind, now - elapsed, now)

    def _read_block(self, argument: tuple[_Turn, int]) -> tuple[list[Any], bool, int]:
        """(elements, has the iterable ended, ns): an iterable ends with the block that it cannot fill."""
        place, count = argument
        start = time.perf_counter_ns()
        if place.values is None:
            place.values = skipped(self.operator.function(place.value), place.given)
            place.opening = max(1, time.perf_counter_ns() - start)
            start = time.perf_counter_ns()
        values = list(islice(place.values, count))
        return values, len(values) < count, time.perf_counter_ns() - start

    def _position(self) -> dict[str, Any]:
        assert self.places is not None
        places = [None if place is None else [place.before, place.given] for place in self.places]
        return {"outer": self.outer, "places": places, "at": self.at, "used": self.used}
