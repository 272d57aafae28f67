"""Operations that share a device: work is conserved, nothing beats the linear program, and shares are never worse than taking turns."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.sim.interference import FREE, NANOFLOW, best_shares, interference, least
from armillary.sim.overlap import Task, bound, greedy, sequential

CHAINS = st.lists(
    st.lists(st.tuples(st.sampled_from(("compute", "memory", "network")), st.integers(1, 9)), min_size=1, max_size=4),
    min_size=1,
    max_size=3,
)


def chained(chains):
    tasks = []
    for chain in chains:
        before = ()
        for resource, duration in chain:
            tasks.append(Task(f"{len(tasks)}", resource, float(duration), before))
            before = (len(tasks) - 1,)
    return tasks


@given(CHAINS, st.sampled_from((NANOFLOW, FREE)))
@settings(max_examples=12, deadline=None)
def test_every_operation_does_its_work_in_order_within_the_device(chains, table):
    tasks = chained(chains)
    starts = greedy(tasks).starts
    done = best_shares(tasks, starts, table)
    work, ends, begins = defaultdict(float), {}, {}
    for piece in done.pieces:
        assert piece.speed == pytest.approx(table.speed(tasks[piece.place].resource, piece.share) if piece.share < 1 else 1.0)
        work[piece.place] += (piece.end - piece.start) * piece.speed
        begins.setdefault(piece.place, piece.start)
        ends[piece.place] = piece.end
        beside = [one for one in done.pieces if one.start < piece.end - 1e-12 and piece.start < one.end - 1e-12]
        assert sum(one.share for one in beside) <= 1 + 1e-9
        assert len({tasks[one.place].resource for one in beside}) == len(beside)
    for place, task in enumerate(tasks):
        assert work[place] == pytest.approx(task.duration)
        assert all(begins[place] >= ends[one] - 1e-9 for one in task.after)
    assert least(tasks, table) - 1e-6 <= done.makespan <= sequential(tasks) + 1e-9
    assert least(tasks, table) >= max(sum(t.duration for t in tasks if t.resource == name) for name in {t.resource for t in tasks}) - 1e-6


def test_without_interference_two_chains_take_what_the_busiest_part_needs():
    tasks = chained([[("compute", 3), ("memory", 3)], [("compute", 3), ("memory", 3)]])
    assert best_shares(tasks, (0, 3, 3, 6), FREE).makespan == pytest.approx(9)
    assert least(tasks, FREE) == pytest.approx(6)
    assert bound(tasks) == 6


def test_a_product_beside_a_decode_s_attention_has_what_the_table_leaves():
    """With two fifths of the device attention runs at 80 %, and the product at 60 %: both are done after 10 in place of 14."""
    tasks = chained([[("compute", 6)], [("memory", 8)]])
    done = best_shares(tasks, (0, 0), NANOFLOW)
    assert done.makespan == pytest.approx(10)
    assert done.shares[frozenset(("compute", "memory"))] == {"compute": 0.6, "memory": 0.4}
    assert least(tasks, NANOFLOW) == pytest.approx(10)


def test_an_unknown_table_is_named_with_those_that_there_are():
    with pytest.raises(InputError, match="nanoflow-a100"):
        interference("luck")
