"""Bars lose no span, invent no time, and are few."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.core.trace import Span
from armillary.core.trace_bars import bars
from armillary.core.trace_summary import covered

spans = st.lists(
    st.builds(
        lambda lane, kind, start, duration: Span(lane, kind, start, start + duration),
        st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(-50, 200), st.integers(0, 30),
    ),
    max_size=40,
)  # fmt: skip


@given(spans, st.integers(1, 40))
def test_every_span_is_in_a_bar_and_every_bar_is_covered_but_for_a_cell(drawn_from: list[Span], resolution: int) -> None:
    drawn = bars(drawn_from, resolution)
    assert sum(bar.spans for bar in drawn) == len(drawn_from)
    by_lane = defaultdict(list)
    for span in drawn_from:
        by_lane[span.lane].append(span)
    for lane, own in by_lane.items():
        bar_time = [(bar.start, bar.end) for bar in drawn if bar.lane == lane]
        for span in own:
            assert any(start <= span.start and span.end <= end for start, end in bar_time)
        assert min(start for start, _ in bar_time) == min(span.start for span in own)
        assert max(end for _, end in bar_time) == max(span.end for span in own)
        # A joined bar may bridge what lies between the spans of two neighbouring cells, never more than two cells.
        joined = sum(bar.spans - 1 for bar in drawn if bar.lane == lane)
        assert covered(bar_time) <= covered((span.start, span.end) for span in own) + 2 * resolution * joined


@given(spans)
def test_at_the_finest_resolution_every_lasting_span_is_its_own_bar(drawn_from: list[Span]) -> None:
    lasting = [span for span in drawn_from if span.duration > 0]
    drawn = bars(lasting, 1)
    assert sorted(map(str, (bar.first for bar in drawn))) == sorted(map(str, lasting))
    assert all((bar.lane, bar.kind, bar.start, bar.end, bar.spans) == (*bar.first[:4], 1) for bar in drawn)


@given(spans, st.integers(1, 10))
def test_the_limit_holds(drawn_from: list[Span], limit: int) -> None:
    lanes = len({span.lane for span in drawn_from})
    assert len(bars(drawn_from, 1, limit)) <= max(limit, lanes)


def test_a_cell_has_the_kind_with_the_most_time() -> None:
    short = [Span("a", "x", 0, 2), Span("a", "y", 2, 9), Span("a", "x", 9, 10), Span("a", "y", 10, 15)]
    (bar,) = bars(short, 10)
    assert (bar.kind, bar.start, bar.end, bar.spans) == ("y", 0, 15, 4)


def test_bounds() -> None:
    with pytest.raises(InputError):
        bars([], 0)
    with pytest.raises(InputError):
        bars([], 1, 0)
