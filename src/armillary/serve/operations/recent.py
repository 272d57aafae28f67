"""The requests of late, running and ended, each as a row of plain values."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

from armillary.core.clock import Clock
from armillary.core.units import MS
from armillary.serve.request import Event, Request

KEPT = 256


class RecentRequests:
    """An observer. Of requests that have ended it keeps the numbers and not the request, so that no text stays in memory."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._running: dict[str, tuple[Request, float]] = {}  # and the time of day that it came
        self._ended: OrderedDict[str, dict[str, Any]] = OrderedDict()

    def submitted(self, request: Request) -> None:
        self._running[request.id] = request, time.time()

    def event(self, request: Request, event: Event) -> None:
        if event.finish_reason is None or request.id not in self._running:
            return
        _, came = self._running.pop(request.id)
        self._ended[request.id] = self._row(request, came)
        while len(self._ended) > KEPT:
            self._ended.popitem(last=False)

    def rows(self) -> list[dict[str, Any]]:
        """Those that run and wait, then those that have ended, the latest first in each."""
        return [self._row(*entry) for entry in reversed(list(self._running.values()))] + list(reversed(self._ended.values()))

    def of(self, answer_id: str) -> Iterator[dict[str, Any]]:
        """The request of that id, or all choices of the answer of that id, in order."""
        found = [row for row in self.rows() if row["id"] == answer_id or row["id"].rpartition("/")[0] == answer_id]
        yield from sorted(found, key=lambda row: (len(row["id"]), row["id"]))

    def _row(self, request: Request, came: float) -> dict[str, Any]:
        """`state` is queued, running, or how it ended; durations in ms, None for what it has not come to."""
        now = self._clock.now()
        state = request.finish_reason or ("running" if request.first_scheduled is not None else "queued")
        return {
            "id": request.id,
            "state": state,
            "created": round(came, 3),
            "prompt_tokens": len(request.prompt),
            "cached_tokens": request.reused,
            "computed_tokens": request.computed,
            "completion_tokens": len(request.output),
            "max_tokens": request.sampling.max_tokens,
            "preemptions": request.preemptions,
            "waited_ms": _ms(request.arrival, request.first_scheduled or (now if request.finish_reason is None else request.finished)),
            "first_token_ms": _ms(request.arrival, request.first_token),
            "total_ms": _ms(request.arrival, request.finished or now),
        }


def _ms(start: int | None, end: int | None) -> float | None:
    return round((end - start) / MS, 3) if start is not None and end is not None else None
