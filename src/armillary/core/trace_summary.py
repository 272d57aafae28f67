"""A trace in numbers: how busy each lane was, how lanes overlapped, and how long each kind of span took."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from armillary.core.errors import InputError, NotFoundError
from armillary.core.trace import Span, Trace

Interval = tuple[int, int]
"""start, end in ns."""


@dataclass(frozen=True, slots=True)
class KindSummary:
    """Durations (ns) of the spans of one kind. Percentiles are nearest-rank: each is a duration that occurred."""

    kind: str
    spans: int
    total: int
    shortest: int
    p50: int
    p90: int
    p99: int
    longest: int

    @property
    def mean(self) -> float:
        return self.total / self.spans


@dataclass(frozen=True, slots=True)
class LaneSummary:
    """One lane. `busy` is the ns covered by at least one span; `share` is that over the whole trace's extent."""

    lane: str
    spans: int
    busy: int
    share: float
    kinds: tuple[KindSummary, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """A trace from its first start to its last end (ns). Lanes and kinds are in order of appearance."""

    name: str
    start: int
    end: int
    spans: int
    dropped: int
    lanes: tuple[LaneSummary, ...]
    kinds: tuple[KindSummary, ...]  # over all lanes

    @property
    def extent(self) -> int:
        """ns."""
        return self.end - self.start

    def lane(self, name: str) -> LaneSummary:
        for lane in self.lanes:
            if lane.lane == name:
                return lane
        raise _no_lane(name, [lane.lane for lane in self.lanes])


def summarise(trace: Trace) -> Summary:
    """The summary of the spans that the trace still holds (all zero when it holds none)."""
    spans = trace.spans()
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    start = min((span.start for span in spans), default=0)
    end = max((span.end for span in spans), default=0)
    extent = end - start
    summaries = []
    for lane, own in lanes.items():
        busy = covered((span.start, span.end) for span in own)
        summaries.append(LaneSummary(lane, len(own), busy, busy / extent if extent else 0.0, _kinds(own)))
    return Summary(trace.name, start, end, len(spans), trace.dropped, tuple(summaries), _kinds(spans))


def overlap(trace: Trace, lane_a: str, lane_b: str) -> int:
    """How long (ns) both lanes were busy at once, such as computation and communication. Raises NotFoundError for an unknown lane."""
    spans = trace.spans()
    found = {span.lane for span in spans}
    for lane in (lane_a, lane_b):
        if lane not in found:
            raise _no_lane(lane, sorted(found))
    a, b = (union((span.start, span.end) for span in spans if span.lane == lane) for lane in (lane_a, lane_b))
    shared = i = j = 0
    while i < len(a) and j < len(b):
        shared += max(0, min(a[i][1], b[j][1]) - max(a[i][0], b[j][0]))
        if a[i][1] <= b[j][1]:
            i += 1
        else:
            j += 1
    return shared


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same instants as disjoint intervals in order."""
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def covered(intervals: Iterable[Interval]) -> int:
    """ns in at least one of the intervals."""
    return sum(end - start for start, end in union(intervals))


def percentile(ordered: Sequence[int], percent: int) -> int:
    """Nearest rank: the least value with at least `percent` % (1 to 100) of the sorted values at or below it."""
    if not ordered or not 0 < percent <= 100:
        raise InputError(f"no {percent}th percentile of {len(ordered)} values", "give a percent of 1 to 100 and at least one value")
    return ordered[-(-percent * len(ordered) // 100) - 1]


def _kinds(spans: Iterable[Span]) -> tuple[KindSummary, ...]:
    durations: dict[str, list[int]] = defaultdict(list)
    for span in spans:
        durations[span.kind].append(span.end - span.start)
    summaries = []
    for kind, values in durations.items():
        values.sort()
        p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
        summaries.append(KindSummary(kind, len(values), sum(values), values[0], p50, p90, p99, values[-1]))
    return tuple(summaries)


def _no_lane(name: str, known: Sequence[str]) -> NotFoundError:
    shown = ", ".join(known[:10]) + (f" and {len(known) - 10} more" if len(known) > 10 else "")
    return NotFoundError(f"the trace has no lane {name!r}", f"its lanes are {shown}" if known else "it has no spans")
