"""Overlapped schedules: valid, between the bound and the sum, optimal where the optimum is known."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.sim.overlap import Task, bound, greedy, overlapped, sequential


def valid(tasks, overlap):
    ends = [start + task.duration for start, task in zip(overlap.starts, tasks, strict=True)]
    for task, start in zip(tasks, overlap.starts, strict=True):
        assert start >= -1e-6
        assert all(start >= ends[one] - 1e-6 for one in task.after)
    for resource in {task.resource for task in tasks}:
        spans = sorted((s, e) for s, e, task in zip(overlap.starts, ends, tasks, strict=True) if task.resource == resource)
        assert all(before[1] <= after[0] + 1e-6 for before, after in itertools.pairwise(spans))
    assert overlap.makespan == pytest.approx(max(ends), abs=1e-6)


CHAINS = st.lists(st.lists(st.tuples(st.sampled_from("cmn"), st.integers(1, 9)), min_size=1, max_size=4), min_size=1, max_size=2)


def chained(chains):
    tasks = []
    for chain in chains:
        before = ()
        for resource, duration in chain:
            tasks.append(Task(f"{len(tasks)}", resource, float(duration), before))
            before = (len(tasks) - 1,)
    return tasks


@given(CHAINS)
@settings(max_examples=25, deadline=None)
def test_a_schedule_is_valid_and_between_the_bound_and_the_sum(chains):
    tasks = chained(chains)
    quick, found = greedy(tasks), overlapped(tasks)
    valid(tasks, quick)
    valid(tasks, found)
    assert found.optimal
    assert bound(tasks) - 1e-6 <= found.makespan <= quick.makespan <= sequential(tasks)


def test_two_halves_use_two_resources_at_once():
    """Compute 3, then memory 3, twice: 9, for only the first memory hides behind the second's compute."""
    assert overlapped(chained([[("c", 3), ("m", 3)], [("c", 3), ("m", 3)]])).makespan == pytest.approx(9)


def test_greed_is_beaten():
    """Whoever can begin first is not who should: the long chain's second step must be begun early."""
    tasks = [Task("a", "c", 1.0), Task("b", "c", 4.0), Task("c", "m", 6.0, (0,)), Task("d", "m", 5.0)]
    assert overlapped(tasks).makespan <= greedy(tasks).makespan
    assert overlapped(tasks).makespan == pytest.approx(11)


def test_what_cannot_be_scheduled_is_refused():
    with pytest.raises(InputError, match="not before it"):
        overlapped([Task("a", "c", 1.0, (1,)), Task("b", "c", 1.0)])
    with pytest.raises(InputError, match="0 operations"):
        overlapped([])
