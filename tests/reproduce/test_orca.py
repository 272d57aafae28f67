"""What Orca's scheduling is, in closed form, stages that batches take in turn, and a registry that tells the truth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import NotFoundError
from armillary.reproduce import orca, registry
from armillary.serve.workload.requests import Arrival
from armillary.sim.costs import Decoding, Linear

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@settings(max_examples=40)
@given(LENGTHS)
def test_by_the_iteration_each_leaves_when_it_ends_and_by_the_request_all_leave_with_the_longest(lengths: list[int]) -> None:
    jobs = [Arrival(0, 1, length) for length in lengths]
    by_iteration, _ = orca.serve("orca", jobs, orca.UNIT, seats=len(jobs))
    by_request, _ = orca.serve("request-level", jobs, orca.UNIT, seats=len(jobs))
    assert [orca.latency(request) for request in by_iteration] == lengths
    assert [orca.latency(request) for request in by_request] == [max(lengths)] * len(lengths)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(2, 12))
def test_as_many_even_batches_as_stages_keep_all_of_them_busy(stages: int, seats: int, answer: int) -> None:
    """Every batch decodes at the pace of a batch alone: the last begins stages - 1 stages late and ends as late."""
    even = Linear("even", 60, 0, 0, Decoding(60, 0, 0))
    jobs = [Arrival(0, 1, answer)] * (stages * seats)
    requests, _ = orca.serve("orca", jobs, even, seats, stages)
    assert sorted({orca.latency(request) for request in requests}) == [60 * answer + 60 // stages * late for late in range(stages)]


def test_a_long_batch_delays_the_one_behind_it_by_a_bubble() -> None:
    """A prompt of 100 ns in two stages: a decode behind it waits for its first stage, and then again for its second."""
    uneven = Linear("uneven", 0, 1, 0, Decoding(2, 0, 0))
    requests, _ = orca.serve("orca", [Arrival(0, 100, 1), Arrival(0, 2, 2)], uneven, 1, 2)
    assert [orca.latency(request) for request in requests] == [100, 50 + 50 + 1 + 2]


def test_the_workload_at_another_rate_is_the_same_work_sooner() -> None:
    slow, fast = orca.workload(1.0), orca.workload(4.0)
    assert [(job.prompt, job.answer) for job in slow] == [(job.prompt, job.answer) for job in fast]
    assert [job.at for job in slow] == pytest.approx([4 * job.at for job in fast], abs=8)


@pytest.mark.slow
def test_every_row_holds_and_the_headline_does_not_exceed_what_was_published() -> None:
    result = registry.get("orca").run()
    assert [row.quantity for row in result.rows if not row.holds] == []
    headline = result.rows[-1]
    assert headline.published == 36.9
    assert headline.ours < headline.published
    assert [len(trace) > 0 for _, trace in result.pictures] == [True, True]


def test_every_name_of_the_registry_is_an_experiment_of_that_name() -> None:
    for name in registry.names():
        assert registry.get(name).name == name
    with pytest.raises(NotFoundError, match="did you mean orca"):
        registry.get("orka")


def test_a_row_holds_within_its_bounds_and_nowhere_else() -> None:
    def row(ours: float) -> registry.Row:
        return registry.Row("q", "x", 10, "there", ours, 8, 12, "a fifth")

    assert [row(ours).holds for ours in (7.99, 8, 12, 12.01, float("nan"))] == [False, True, True, False, False]
    assert row(5).ratio == 0.5
    assert registry.exactly("q", "", 3, "there", 3).holds
    assert not registry.exactly("q", "", 3, "there", 3.001).holds
    assert registry.exactly("q", "", 0, "there", 0).ratio is None
