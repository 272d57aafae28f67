"""What users would have felt: every request's times in columns, and how long they waited between tokens."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.serve.request import Request
from armillary.serve.schedule import Plan

NEVER = -1
_KEPT: Final = 1 << 20  # gaps that are known to the ns; beyond, all are rounded ...
_STEPS: Final = 1 << 11  # ... to so many of each power of two, by at most a 4,096th


class Recorder:
    """Columns of the requests that have ended, 64 bytes each, so that a million take little memory; ns of virtual time.

    `gaps` between tokens are kept as (ns, how many) pairs; tokens that one iteration gives together have none between them. After a million
    pairs they are rounded by at most a 4,096th and equal ones are one, so that a simulation may go on for ever.
    """

    def __init__(self, told: Callable[[Request], None] | None = None) -> None:
        """`told` hears of each request that ends."""
        self._told = told
        self._columns = {
            name: array("q")
            for name in ("arrival", "first_scheduled", "first_token", "finished", "prompt", "answer", "preemptions", "reused")
        }
        self._gaps, self._counts = array("q"), array("q")

    def ended(self, request: Request) -> None:
        """A request is over."""
        columns = self._columns
        columns["arrival"].append(request.arrival or 0)
        columns["first_scheduled"].append(NEVER if request.first_scheduled is None else request.first_scheduled)
        columns["first_token"].append(NEVER if request.first_token is None else request.first_token)
        columns["finished"].append(NEVER if request.finished is None else request.finished)
        columns["prompt"].append(len(request.prompt))
        columns["answer"].append(len(request.output))
        columns["preemptions"].append(request.preemptions)
        columns["reused"].append(request.reused)
        if self._told is not None:
            self._told(request)

    def waited(self, plan: Plan, ends: NDArray[np.int64]) -> None:
        """Iterations that repeat `plan` end at `ends` ns, and none of their tokens has been handed out. [iterations]"""
        first = int(ends[0])
        before = [request.last_token for entry, request in zip(plan.schedule.entries, plan.requests, strict=True) if entry.sample]
        instants = before[:1] if before and before.count(before[0]) == len(before) else set(before)  # most often one
        for instant in instants:
            if instant is not None:
                self._gaps.append(first - instant)
                self._counts.append(before.count(instant))
        if len(ends) > 1:
            self._gaps.frombytes((ends[1:] - ends[:-1]).tobytes())
            self._counts.extend(array("q", (len(before),)) * (len(ends) - 1))
        if len(self._gaps) > _KEPT:
            self._fold()

    def _fold(self) -> None:
        mantissas, exponents = np.frexp(np.array(self._gaps, dtype=np.float64))
        rounded = np.ldexp(np.rint(mantissas * (2 * _STEPS)), exponents).astype(np.float64) / (2 * _STEPS)
        gaps, places = np.unique(np.rint(rounded).astype(np.int64), return_inverse=True)
        counts = np.bincount(places, weights=np.array(self._counts, dtype=np.float64)).astype(np.int64)
        self._gaps, self._counts = array("q", gaps.tobytes()), array("q", counts.tobytes())

    def __len__(self) -> int:
        return len(self._columns["arrival"])

    def result(self) -> Result:
        """Everything so far."""
        columns = {name: np.array(column, dtype=np.int64) for name, column in self._columns.items()}
        return Result(**columns, gaps=np.array(self._gaps, dtype=np.int64), gap_counts=np.array(self._counts, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Result:
    """Requests as columns [requests], in the order in which they ended; times in ns. `gaps` between tokens occurred `gap_counts` times."""

    arrival: NDArray[np.int64]
    first_scheduled: NDArray[np.int64]
    first_token: NDArray[np.int64]
    finished: NDArray[np.int64]
    prompt: NDArray[np.int64]
    answer: NDArray[np.int64]
    preemptions: NDArray[np.int64]
    reused: NDArray[np.int64]
    gaps: NDArray[np.int64]
    gap_counts: NDArray[np.int64]

    @property
    def waits(self) -> NDArray[np.int64]:
        """ns from arrival to the first iteration."""
        return self.first_scheduled - self.arrival

    @property
    def first_tokens(self) -> NDArray[np.int64]:
        """ns from arrival to the first token (TTFT)."""
        return self.first_token - self.arrival

    @property
    def per_token(self) -> NDArray[np.float64]:
        """ns a token after the first (TPOT), of those that have more than one."""
        several = self.answer > 1
        spans: NDArray[np.float64] = (self.finished - self.first_token)[several] / (self.answer[several] - 1)
        return spans

    @property
    def makespan(self) -> int:
        """ns from the first arrival to the last end."""
        return int(self.finished.max() - self.arrival.min()) if len(self.arrival) else 0

    @property
    def throughput(self) -> float:
        """Generated tokens a second."""
        return float(self.answer.sum()) * 1e9 / self.makespan if self.makespan else 0.0

    def gap(self, percent: float) -> int:
        """The time between tokens that `percent` % of them do not exceed, ns (nearest rank); 0 where there are none."""
        if not len(self.gaps):
            return 0
        order = np.argsort(self.gaps, kind="stable")
        ranks = np.cumsum(self.gap_counts[order])
        return int(self.gaps[order][np.searchsorted(ranks, max(1, np.ceil(percent / 100 * ranks[-1])))])

    def attainment(self, first_token: float | None = None, per_token: float | None = None, wait: float | None = None) -> float:
        """The share of requests whose first token came within `first_token` ns, whose others took at most `per_token` ns each on average,
        and that were in the queue for at most `wait` ns.

        An answer of one token has no others. 1 where there are no requests.
        """
        kept = np.ones(len(self.arrival), dtype=bool)
        if first_token is not None:
            kept &= self.first_tokens <= first_token
        if per_token is not None:
            kept &= self.finished - self.first_token <= per_token * np.maximum(0, self.answer - 1)
        if wait is not None:
            kept &= self.waits <= wait
        return float(kept.mean()) if len(kept) else 1.0
