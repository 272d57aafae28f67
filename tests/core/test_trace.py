"""A trace keeps the last `capacity` spans exactly, whoever adds them, and says what it dropped."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.core.trace import CounterSample, Span, Trace
from armillary.core.trace_columns import SEGMENT

times = st.integers(-(2**62), 2**62 - 1)
numbers = st.integers() | st.floats(allow_nan=False)
sizes = st.dictionaries(st.text(max_size=5), numbers, max_size=3)
words = st.text(max_size=8)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    start, end = sorted((draw(times), draw(times)))
    return Span(draw(words), draw(words), start, end, draw(words), draw(sizes))


@given(st.lists(spans(), max_size=30), st.integers(1, 40), st.integers(0, 2 * SEGMENT + 5))
def test_it_keeps_the_last_spans_and_counts_the_rest(added: list[Span], capacity: int, before: int) -> None:
    """Whatever the segments' borders: `before` plain spans go first, then those drawn."""
    capacity = capacity * 100  # below, around and above a segment
    plain = [Span("lane", "kind", i, i + 1) for i in range(before)]
    trace = Trace(capacity=capacity)
    trace.extend(plain + added)
    everything = plain + added
    assert trace.spans() == everything[-capacity:]
    assert len(trace) == min(capacity, len(everything))
    assert trace.dropped == len(everything) - len(trace)


@given(
    st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 100)), max_size=40),
    st.integers(0, 2 * SEGMENT + 50),
    st.integers(0, 12_000),
    st.sampled_from([1, 30, SEGMENT, SEGMENT + 1, 1500, 10_000]),
)
def test_tail_is_the_filter_of_all(pairs: list[tuple[int, int]], ordered: int, since: int, capacity: int) -> None:
    """Also when spans end out of order: an early one that ends late is not forgotten."""
    trace = Trace(capacity=capacity)
    half = len(pairs) // 2
    for start, duration in pairs[:half]:
        trace.add("a", "k", start, start + duration)
    for i in range(ordered):
        trace.add("b", "k", i, i + 3, sizes={"i": i})
    for start, duration in pairs[half:]:
        trace.add("a", "k", start, start + duration)
    assert trace.tail(since) == [span for span in trace.spans() if span.end > since]


def test_counters_are_bounded_apart_from_spans() -> None:
    trace = Trace(capacity=10)
    for i in range(3000):
        trace.count("kv_blocks", i, {"used": i, "share": i / 2})
    trace.add("a", "k", 0, 1)
    assert trace.counters() == [CounterSample("kv_blocks", i, {"used": i, "share": i / 2}) for i in range(2990, 3000)]
    assert (trace.dropped_counters, trace.dropped, len(trace)) == (2990, 0, 1)
    assert [sample.at for sample in trace.tail_counters(2997)] == [2998, 2999]


def test_threads_lose_nothing_and_keep_their_order() -> None:
    trace, each, workers = Trace(), 5000, 4
    seen: list[int] = []
    start = threading.Barrier(workers + 1)

    def write(lane: str) -> None:
        start.wait()
        for i in range(each):
            trace.add(lane, "k", i, i + 1)

    threads = [threading.Thread(target=write, args=(str(n),)) for n in range(workers)]
    for thread in threads:
        thread.start()
    start.wait()
    while any(thread.is_alive() for thread in threads):
        snapshot = trace.spans()  # a reader in the middle sees a prefix of every lane
        seen.append(len(snapshot))
        for n in range(workers):
            own = [span.start for span in snapshot if span.lane == str(n)]
            assert own == list(range(len(own)))
    assert seen == sorted(seen)
    assert len(trace) == each * workers
    for n in range(workers):
        assert [span.start for span in trace.spans() if span.lane == str(n)] == list(range(each))


def test_a_caller_may_reuse_its_sizes() -> None:
    trace, mine = Trace(), {"tokens": 1}
    trace.add("a", "k", 0, 1, sizes=mine)
    mine["tokens"] = 2
    assert trace.spans()[0].sizes == {"tokens": 1}


def test_numpy_scalars_become_plain_numbers() -> None:
    trace = Trace()
    trace.add("a", "k", np.int64(1), np.int32(2), sizes={"n": np.int64(3), "x": np.float32(0.5), "b": True})  # type: ignore[arg-type]
    span = trace.spans()[0]
    assert span == Span("a", "k", 1, 2, "", {"n": 3, "x": 0.5, "b": 1})
    assert {type(value) for value in (span.start, span.end, *span.sizes.values())} == {int, float}


@pytest.mark.parametrize(
    ("start", "end", "values"),
    [(2, 1, {}), (0.5, 1, {}), (None, 1, {}), (0, 2**63, {}), (-(2**64), 0, {}), (0, 1, {"n": "many"})],
)
def test_what_is_not_a_span_is_refused_and_leaves_no_mark(start: int, end: int, values: dict[str, float]) -> None:
    trace = Trace()
    with pytest.raises(InputError):
        trace.add("a", "k", start, end, sizes=values)
    assert trace.spans() == []


def test_a_trace_must_hold_something() -> None:
    with pytest.raises(InputError, match="capacity"):
        Trace(capacity=0)
