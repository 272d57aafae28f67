"""The event core: what happens next in virtual time, deterministic to the last tie."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Generic, TypeVar

from armillary.core.errors import InputError

T = TypeVar("T")


class EventQueue(Generic[T]):
    """Events in the order of (time, sequence): of those at one instant the one that was scheduled first comes first.

    Times are integer ns and never go back. A cancelled event stays in the heap and is passed over, which costs less than taking it out.
    """

    def __init__(self) -> None:
        self.now = 0
        self._heap: list[tuple[int, int, T]] = []
        self._sequence = 0
        self._cancelled: set[int] = set()

    def at(self, time: int, event: T) -> int:
        """`event` happens at `time` ns; its number, for `cancel`. Raises InputError for a time that has passed."""
        if time < self.now:
            raise InputError(f"an event at {time} ns is in the past: it is {self.now} ns", "schedule events from now on")
        number = self._sequence
        self._sequence = number + 1
        heappush(self._heap, (time, number, event))
        return number

    def after(self, delay: int, event: T) -> int:
        """`event` happens `delay` ns from now."""
        return self.at(self.now + delay, event)

    def cancel(self, number: int) -> None:
        """The event of that number, which has not happened yet, does not."""
        self._cancelled.add(number)

    def pop(self) -> T | None:
        """The next event, at whose time it then is; None when nothing happens any more."""
        heap = self._heap
        while heap:
            time, number, event = heappop(heap)
            if self._cancelled and number in self._cancelled:
                self._cancelled.remove(number)
                continue
            self.now = time
            return event
        return None

    @property
    def next_time(self) -> int | None:
        """When the next event happens, ns."""
        heap = self._heap
        while heap and self._cancelled and heap[0][1] in self._cancelled:
            self._cancelled.remove(heappop(heap)[1])
        return heap[0][0] if heap else None

    def __len__(self) -> int:
        return len(self._heap) - len(self._cancelled)
