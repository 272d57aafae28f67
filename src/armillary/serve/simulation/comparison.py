"""Two traces of the same requests, one beside the other: what was predicted, by how much it was wrong, where the schedules part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.schedule import Reason

_REQUEST = "request/"

Share = tuple[str, str, int]
"""Request, reason, tokens: what one sequence did in an iteration."""


@dataclass(frozen=True, slots=True)
class Times:
    """What one request felt, ns of its trace's clock. `tokens` counts iterations that gave one (with drafts, each may give several)."""

    arrival: int
    first_token: int
    last_token: int
    tokens: int

    @property
    def ttft(self) -> int:
        return self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """ns a token after the first; None when there is no other."""
        return (self.last_token - self.first_token) / (self.tokens - 1) if self.tokens > 1 else None


@dataclass(frozen=True, slots=True)
class Errors:
    """Of one measure: relative errors by request (their median and 99th percentile), and of the measure's own median and 99th percentile.

    The two differ: a request that just missed an iteration's beginning in one trace and not in the other is far off by itself,
    while as many others are off the other way.
    """

    requests: int
    median: float
    p99: float
    of_median: float
    of_p99: float
    bias: float  # the mean of the signed errors: over 0 where the second trace is slower

    @classmethod
    def between(cls, real: Sequence[float], virtual: Sequence[float]) -> Errors:
        one, other = np.array(real, dtype=np.float64), np.array(virtual, dtype=np.float64)
        if not len(one):
            return cls(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        off = (other - one) / np.maximum(one, 1.0)
        of = [abs(float(np.quantile(other, q) / max(1.0, np.quantile(one, q)) - 1)) for q in (0.5, 0.99)]
        median, p99 = np.quantile(np.abs(off), (0.5, 0.99)).tolist()
        return cls(len(one), median, p99, of[0], of[1], float(off.mean()))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first iteration in which the schedules are not the same: who computed what in each; empty when one trace has ended."""

    iteration: int
    real: tuple[Share, ...]
    virtual: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """`only` are requests that one trace lacks. Makespans are from the first arrival to the last token, ns."""

    requests: dict[str, tuple[Times, Times]]
    only: tuple[str, ...]
    iterations: tuple[int, int]
    makespans: tuple[int, int]
    ttft: Errors
    tpot: Errors
    difference: Difference | None = field(default=None)

    @property
    def makespan_error(self) -> float:
        return abs(self.makespans[1] / max(1, self.makespans[0]) - 1)


def compare(real: Trace, virtual: Trace) -> Comparison:
    """Of the requests that both have. Raises InputError for a trace that lost its beginning or has no requests."""
    (ours, steps), (theirs, others) = _read(real, "the first"), _read(virtual, "the second")
    both = [name for name in ours if name in theirs]
    if not both:
        raise InputError("the two traces have no request in common", "compare two runs of the same workload, with the same request ids")
    pairs = {name: (ours[name], theirs[name]) for name in both}
    slow = [(one.tpot, other.tpot) for one, other in pairs.values() if one.tpot is not None and other.tpot is not None]
    return Comparison(
        pairs,
        tuple(sorted(ours.keys() ^ theirs.keys())),
        (len(steps), len(others)),
        (_makespan(list(ours.values())), _makespan(list(theirs.values()))),
        Errors.between([one.ttft for one, _ in pairs.values()], [other.ttft for _, other in pairs.values()]),
        Errors.between([one for one, _ in slow], [other for _, other in slow]),
        first_difference(steps, others),
    )


def schedules(trace: Trace) -> list[tuple[Share, ...]]:
    """Who computed what in each iteration, in order."""
    return _read(trace, "the trace")[1]


def first_difference(real: Sequence[tuple[Share, ...]], virtual: Sequence[tuple[Share, ...]]) -> Difference | None:
    """None where the schedules are the same to the end."""
    for place in range(max(len(real), len(virtual))):
        one = real[place] if place < len(real) else ()
        other = virtual[place] if place < len(virtual) else ()
        if one != other:
            return Difference(place, one, other)
    return None


def _makespan(times: Sequence[Times]) -> int:
    return max(one.last_token for one in times) - min(one.arrival for one in times)


def _read(trace: Trace, which: str) -> tuple[dict[str, Times], list[tuple[Share, ...]]]:
    """Each request's times, and the schedules. The engine adds an iteration's span and, right after it, those of its sequences.

    Of one that was preempted while it was computed again the trace does not say whether it had its token: it is taken to have.
    """
    if trace.dropped:
        raise InputError(
            f"{which} trace lost {trace.dropped:,} spans, so its beginning is unknown", "record with a trace of a larger capacity"
        )
    steps: list[list[Share]] = []
    arrived: dict[str, int] = {}
    drawn: dict[str, list[int]] = {}  # when each token came
    again: set[str] = set()  # whose last piece was a recomputed one
    for span in trace.spans():
        if span.lane == "engine" and span.kind == "step":
            steps.append([])
        elif span.lane.startswith(_REQUEST):
            name = span.lane.removeprefix(_REQUEST)
            arrived.setdefault(name, span.start)  # the time in the queue comes first; who did not wait has none
            if span.kind not in ("prompt", "decode"):
                again.discard(name)  # preempted: what is computed again from here on gives a token of its own
                continue
            if not steps:
                raise InputError(f"{which} trace has requests but no iterations", "give traces of the serving engine")
            steps[-1].append((name, span.reason, int(span.sizes.get("tokens", 0))))
            ends = drawn.setdefault(name, [])
            if span.reason == Reason.RECOMPUTE and name in again:  # of several pieces the last one gives the token
                ends[-1] = span.end
            elif span.reason != Reason.CHUNK:
                ends.append(span.end)
            if span.reason == Reason.RECOMPUTE:
                again.add(name)
            else:
                again.discard(name)
    times = {name: Times(arrived[name], ends[0], ends[-1], len(ends)) for name, ends in drawn.items() if ends}
    if not times:
        raise InputError(f"{which} trace has no requests", "give traces of the serving engine, such as demo's trace.json")
    return times, [tuple(step) for step in steps]
