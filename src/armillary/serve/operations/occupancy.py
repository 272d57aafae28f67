"""Counts what is in flight from what happens to requests, and refuses more when the shedding rule says so."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from armillary.core.clock import Clock
from armillary.core.units import S
from armillary.serve.operations.shedding import Bounds, Load, refusal
from armillary.serve.request import Event, Request

RECENT_ENDS = 64


class Occupancy:
    """An observer of requests whose `admit` is a service's gate. It asks nothing of whoever runs them."""

    def __init__(self, clock: Clock, block_size: int, bounds: Bounds) -> None:
        self._clock = clock
        self._block_size = block_size
        self._bounds = bounds
        self._in_flight: set[Request] = set()
        self._waiting: dict[Request, int] = {}  # and its KV blocks; those that run by now are found out when it matters
        self._waiting_blocks = 0
        self._busy_before = 0  # ns, but for the time since `_busy_since`
        self._busy_since: int | None = None
        self._ends: deque[int] = deque(maxlen=RECENT_ENDS + 1)  # in busy ns

    def admit(self, requests: Sequence[Request]) -> None:
        """Raises Refused when there is no room for `requests` together."""
        blocks = sum(map(self._blocks, requests))
        if refusal(self.load(), len(requests), blocks, self._bounds) is None:
            return
        self._forget_begun()
        refused = refusal(self.load(), len(requests), blocks, self._bounds)
        if refused is not None:
            raise refused

    def load(self) -> Load:
        """What is in flight; of those that wait an upper bound."""
        return Load(len(self._waiting), self._waiting_blocks, self._rate())

    def submitted(self, request: Request) -> None:
        if not self._in_flight:
            self._busy_since = self._clock.now()
            if not self._ends:
                self._ends.append(self._busy_before)
        self._in_flight.add(request)
        self._waiting[request] = self._blocks(request)
        self._waiting_blocks += self._waiting[request]

    def event(self, request: Request, event: Event) -> None:
        if request not in self._in_flight:  # one of a group that was not taken as a whole
            return
        self._begun(request)
        if event.finish_reason is not None:
            self._ends.append(self._busy())
            self._in_flight.remove(request)
            if not self._in_flight:
                self._busy_before, self._busy_since = self._busy(), None

    def _begun(self, request: Request) -> None:
        self._waiting_blocks -= self._waiting.pop(request, 0)

    def _forget_begun(self) -> None:
        for request in [request for request in self._waiting if request.first_scheduled is not None]:
            self._begun(request)

    def _blocks(self, request: Request) -> int:
        return -(-request.max_length // self._block_size)

    def _busy(self) -> int:
        return self._busy_before + (self._clock.now() - self._busy_since if self._busy_since is not None else 0)

    def _rate(self) -> float | None:
        """Requests that end a second of busy time, over the last of them."""
        if len(self._ends) < 2:
            return None
        return (len(self._ends) - 1) * S / max(1, self._busy() - self._ends[0])
