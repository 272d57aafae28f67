"""Time as integer nanoseconds, real or virtual. Policies never read a clock; executors and the engine do."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """A monotonic clock. Only differences between readings of one clock mean anything."""

    def now(self) -> int:
        """Nanoseconds since an arbitrary origin."""
        ...


class RealClock:
    """The machine's monotonic clock."""

    def now(self) -> int:
        return time.perf_counter_ns()


class VirtualClock:
    """A clock that moves only when told to. `now()` is integer nanoseconds from 0."""

    def __init__(self, start: int = 0) -> None:
        self._now = start

    def now(self) -> int:
        return self._now

    def advance(self, duration: int) -> int:
        """Move forward by `duration` ns (>= 0) and return the new time."""
        if duration < 0:
            raise ValueError(f"virtual time cannot go back: duration {duration} ns is negative")
        self._now += duration
        return self._now

    def advance_to(self, instant: int) -> int:
        """Move forward to `instant` ns (not before now) and return it."""
        return self.advance(instant - self._now)
