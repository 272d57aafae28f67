"""How long requests of one class wait for their first token: what is usual, and what is late."""

from __future__ import annotations

from bisect import insort
from collections import deque

from armillary.core.trace_summary import percentile

WINDOW = 512  # of a class, so that what is usual follows the day
FEWEST = 20  # of which a 95th percentile is one


class Latencies:
    """Times to first token (ns) by class: prompts of which about as many tokens have to be computed, in powers of two."""

    def __init__(self) -> None:
        self._recent: dict[int, deque[int]] = {}
        self._sorted: dict[int, list[int]] = {}

    @staticmethod
    def class_of(tokens: int) -> int:
        return max(0, tokens).bit_length()

    def add(self, kind: int, wait: int) -> None:
        recent, ordered = self._recent.setdefault(kind, deque()), self._sorted.setdefault(kind, [])
        if len(recent) == WINDOW:
            ordered.remove(recent.popleft())
        recent.append(wait)
        insort(ordered, wait)

    def late(self, kind: int, percent: int = 95) -> int | None:
        """What `percent` % of the class do not exceed; None while fewer than `FEWEST` were seen."""
        return self._percentile(kind, percent)

    def usual(self, kind: int) -> int | None:
        return self._percentile(kind, 50)

    def _percentile(self, kind: int, percent: int) -> int | None:
        ordered = self._sorted.get(kind, [])
        return percentile(ordered, percent) if len(ordered) >= FEWEST else None
