"""An engine in virtual time that somebody looks at: it waits at a gate until the instant is wanted."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass
from typing import Final

import numpy as np

from armillary.serve.request import Request
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.leap import Leap

_SHOWN: Final = 150  # iterations before the instant that are stepped one by one, for a page to draw


class Abandoned(BaseException):
    """The simulation is not wanted any more; nothing else may catch it."""


@dataclass(eq=False)
class Gate:
    """What the engine of `replica` asks before anything that happens at an instant: it waits until somebody wants to see that time.

    `engine` is that engine once it has been made.
    """

    replica: int = 0
    engine: WatchedEngine | None = None

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self.target = -1  # ns up to which everything may happen
        self._waits = self._ended = self._abandoned = False

    def take(self, engine: VirtualEngine) -> None:
        """Called by the scenario, with an engine that it made to be watched."""
        assert isinstance(engine, WatchedEngine)
        engine.gate, self.engine = self, engine

    def pass_at(self, at: int) -> None:
        """Called by the simulation: returns when `at` ns may come. Raises Abandoned."""
        if at <= self.target and not self._abandoned:
            return
        with self._changed:
            while at > self.target and not self._abandoned:
                self._waits = True
                self._changed.notify_all()
                self._changed.wait()
            self._waits = False
            if self._abandoned:
                raise Abandoned

    def run_to(self, target: int) -> None:
        """Called by who watches: returns when all that happens up to `target` ns has happened."""
        with self._changed:
            self.target, self._waits = target, False
            self._changed.notify_all()
            while not (self._waits or self._ended):
                self._changed.wait()

    def end(self) -> None:
        """Called by the simulation when it is over, however."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def abandon(self) -> None:
        """Called by who watches: the simulation ends at its next event."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()


class WatchedEngine(VirtualEngine):
    """Asks `gate` before it goes on, and steps through the last iterations before the instant that is looked at, so that each can be drawn.

    Leaps and steps tell the same of every request, so what is seen does not hang on where one has looked before.
    """

    gate: Gate

    def submit(self, request: Request) -> None:
        self.gate.pass_at(request.arrival if request.arrival is not None else self.clock.now())
        super().submit(request)

    def begin(self) -> Leap | None:
        self.gate.pass_at(self.clock.now())
        leap = super().begin()
        if leap is None or len(leap.ends) == 1:
            return leap
        unseen = self.gate.target - _SHOWN * int(leap.ends[0] - leap.start)
        return dataclasses.replace(leap, ends=leap.ends[: max(1, int(np.searchsorted(leap.ends, unseen)))])

    def end(self, leap: Leap, count: int | None = None) -> None:
        self.gate.pass_at(int(leap.ends[(count or len(leap.ends)) - 1]))
        super().end(leap, count)
