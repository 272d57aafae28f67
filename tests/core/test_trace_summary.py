"""Busy time is the measure of a union: equal to counting every nanosecond, one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError, NotFoundError
from armillary.core.trace import Trace
from armillary.core.trace_summary import overlap, percentile, summarise

intervals = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.integers(0, 20)), min_size=1, max_size=25)


def instants(spans: list[tuple[str, int, int]], lane: str) -> set[int]:
    return {t for name, start, duration in spans if name == lane for t in range(start, start + duration)}


@given(intervals)
def test_busy_and_overlap_equal_brute_force(spans: list[tuple[str, int, int]]) -> None:
    trace = Trace()
    for lane, start, duration in spans:
        trace.add(lane, "k", start, start + duration)
    summary = summarise(trace)
    first, last = min(start for _, start, _ in spans), max(start + duration for _, start, duration in spans)
    assert (summary.start, summary.end, summary.spans) == (first, last, len(spans))
    lanes = [lane.lane for lane in summary.lanes]
    assert lanes == list(dict.fromkeys(lane for lane, _, _ in spans))
    for lane in summary.lanes:
        busy = len(instants(spans, lane.lane))
        assert lane.busy == busy
        assert lane.share == (busy / (last - first) if last > first else 0)
        assert lane.spans == sum(kind.spans for kind in lane.kinds)
    for a in lanes:
        for b in lanes:
            assert overlap(trace, a, b) == len(instants(spans, a) & instants(spans, b))


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=200), st.integers(1, 100))
def test_a_percentile_is_the_least_value_that_covers_its_share(values: list[int], percent: int) -> None:
    found = percentile(sorted(values), percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    assert sum(value < found for value in values) * 100 < percent * len(values)


def test_kinds_by_lane_and_over_all() -> None:
    trace = Trace("t")
    for i in range(1, 101):
        trace.add("gpu" if i % 2 else "cpu", "decode", 1000 * i, 1000 * i + i)
    trace.add("gpu", "prompt", 0, 7)
    summary = summarise(trace)
    decode = summary.kinds[0]
    assert (decode.kind, decode.spans, decode.total, decode.p50, decode.p90, decode.p99) == ("decode", 100, 5050, 50, 90, 99)
    assert (decode.shortest, decode.longest, decode.mean) == (1, 100, 50.5)
    assert [kind.kind for kind in summary.lane("gpu").kinds] == ["decode", "prompt"]
    assert summary.lane("cpu").kinds[0].p50 == 50


def test_nothing_recorded_and_lanes_unknown() -> None:
    assert summarise(Trace()).lanes == ()
    trace = Trace()
    trace.add("a", "k", 0, 1)
    with pytest.raises(NotFoundError, match=r"no lane 'b'.*its lanes are a"):
        overlap(trace, "a", "b")
    with pytest.raises(NotFoundError, match="no lane 'b'"):
        summarise(trace).lane("b")
    with pytest.raises(InputError):
        percentile([], 50)
