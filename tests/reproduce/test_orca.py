"""What Orca's scheduling is, in closed form, and a registry that tells the truth."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import NotFoundError
from armillary.reproduce import orca, registry
from armillary.serve.executors.scripted import unit_cost

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@settings(max_examples=40)
@given(LENGTHS)
def test_by_the_iteration_each_leaves_when_it_ends_and_by_the_request_all_leave_with_the_longest(lengths: list[int]) -> None:
    jobs = [(0, 1, length) for length in lengths]
    by_iteration, _ = orca.serve("orca", jobs, unit_cost(), seats=len(jobs))
    by_request, _ = orca.serve("request-level", jobs, unit_cost(), seats=len(jobs))
    assert [orca.latency(request) for request in by_iteration] == lengths
    assert [orca.latency(request) for request in by_request] == [max(lengths)] * len(lengths)


def test_the_workload_at_another_rate_is_the_same_work_sooner() -> None:
    slow, fast = orca.workload(1.0), orca.workload(4.0)
    assert [job[1:] for job in slow] == [job[1:] for job in fast]
    assert [job[0] for job in slow] == pytest.approx([4 * job[0] for job in fast], abs=8)


@pytest.mark.slow
def test_every_row_holds_and_the_headline_does_not_exceed_what_was_published() -> None:
    result = registry.get("orca").run()
    assert [row.holds for row in result.rows] == [True] * 4
    headline = result.rows[-1]
    assert headline.published == 36.9
    assert 5 <= headline.ours < headline.published
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
    assert registry.exactly("q", "", 3, "there", 3).holds
    assert not registry.exactly("q", "", 3, "there", 3.001).holds
