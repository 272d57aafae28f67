"""Who loses its blocks: enough of them, none in vain, never the first admitted, and by cost who loses least."""

from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from laws import request

from armillary.serve import policies
from armillary.serve.policies.entries import is_decode
from armillary.serve.schedule import Limits, Reason, State
from armillary.serve.verify import verify

SIZE = 4


class Shared:
    """Blocks below 1000 are one sequence's; the others have as many users as they are used."""

    def __init__(self, requests):
        tables = [block for made in requests for block in made.blocks]
        self._users = {block: tables.count(block) for block in tables}

    def hit(self, made):
        raise AssertionError("nobody waits")

    def references(self, block):
        return self._users[block]


def decoding(name, known, *, max_tokens=100, first_block=0, shared=0, priority=0, output=None):
    """A sequence about to compute its last known token, `shared` of its blocks used by others too."""
    output = output if output is not None else known - 2
    made = request(name, range(known - output), max_tokens)
    made.output, made.computed, made.priority = list(range(output)), known - 1, priority
    owned = -(-(known - 1) // SIZE)
    made.blocks = [1000 + block for block in range(shared)] + list(range(first_block, first_block + owned - shared))
    return made


def state(running, free):
    used = {block for made in running for block in made.blocks}
    return State(0, [], tuple(running), free, Limits(SIZE, free + len(used), 64, 64), Shared(running))


def preempted(running, free, victim, policy="sarathi"):
    seen = state(running, free)
    schedule = policies.get(policy, victim=victim).step(seen)
    verify(schedule, seen)
    return [(one.request_id, one.reason) for one in schedule.preempted]


def test_the_last_admitted_goes_whatever_it_has():
    running = [decoding("old", 5, first_block=0), decoding("long", 41, first_block=10), decoding("young", 2, first_block=30)]
    assert preempted(running, 0, "last") == [("young", Reason.MAKE_ROOM), ("long", Reason.MAKE_ROOM)]


def test_by_cost_one_who_has_enough_goes_before_two_who_have_not():
    """`old`, `a` and `b` need a block each; one victim frees enough, and the cheapest that does has the fewest tokens to compute again."""
    running = [decoding(name, known, first_block=20 * place) for place, (name, known) in enumerate([("old", 5), ("a", 13), ("b", 9)])]
    assert preempted(running, 0, "cost") == [("b", Reason.CHEAPEST)]
    assert preempted(running[:2], 0, "cost") == [("a", Reason.CHEAPEST)]


def test_by_cost_who_has_nearly_answered_is_spared():
    running = [
        decoding("old", 5, first_block=0),
        decoding("half", 41, first_block=10, max_tokens=80, output=39),
        decoding("nearly", 33, first_block=30, max_tokens=32, output=31),
    ]
    assert preempted(running, 0, "cost") == [("half", Reason.CHEAPEST)]


def test_by_cost_blocks_that_others_hold_free_nothing_and_are_found_again():
    running = [
        decoding("old", 41, first_block=0, shared=8),
        decoding("shares", 42, first_block=20, shared=8),  # 3 blocks of its own, 10 tokens to compute again
        decoding("own", 30, first_block=40),  # 8 blocks, 29 tokens
    ]
    assert preempted(running, 0, "cost") == [("shares", Reason.CHEAPEST)]


@pytest.mark.parametrize("victim", ["last", "cost"])
def test_the_lowest_class_goes_first(victim):
    running = [
        decoding(name, 9, first_block=10 * place, priority=priority)
        for place, (name, priority) in enumerate([("old", 9), ("batch", 5), ("live", 0), ("live too", 0)])
    ]
    assert preempted(running, 1, victim) == [("batch", Reason.LOWEST_CLASS)]


SEQUENCES = st.lists(st.tuples(st.integers(3, 60), st.integers(0, 2), st.integers(0, 1)), min_size=1, max_size=7)


@pytest.mark.parametrize("victim", ["last", "cost"])
@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
@given(shapes=SEQUENCES, free=st.integers(0, 3))
@settings(max_examples=120, deadline=None)
def test_victims_are_enough_and_never_more_than_needed(victim, policy, shapes, free):
    running = [
        decoding(f"r{place}", known, first_block=20 * place, shared=min(shared, -(-(known - 1) // SIZE)), priority=priority)
        for place, (known, shared, priority) in enumerate(shapes)
    ]
    seen = state(running, free)
    assume(len(running) > 1 or (running[0].known - 1) % SIZE != 0 or free)  # the door lets nobody in who fills more than the pool

    def lacking(victims):
        left = {name for name in (made.id for made in running) if name not in victims}
        kept = [made for made in running if made.id in left]
        given_back = [block for made in running if made.id in victims for block in made.blocks]
        freed = sum(given_back.count(block) == seen.memory.references(block) for block in set(given_back))
        return sum(max(0, -(-made.known // SIZE) - len(made.blocks)) for made in kept) - freed - free

    everybody = [made.id for made in running[1:]]
    assume(lacking(everybody) <= 0)
    schedule = policies.get(policy, victim=victim).step(seen)
    verify(schedule, seen)
    chosen = [one.request_id for one in schedule.preempted]
    assert lacking(chosen) <= 0
    assert running[0].id not in chosen
    assert [made.id for made in reversed(running) if made.id in chosen] == chosen  # the last admitted is named first
    assert {entry.request_id for entry in schedule.entries} == {made.id for made in running if is_decode(made)} - set(chosen)
    if victim == "cost":
        assert all(lacking(fewer) > 0 for fewer in combinations(chosen, max(0, len(chosen) - 1)) if chosen)
    elif len({made.priority for made in running[1:]}) == 1:
        assert sorted(chosen) == sorted(everybody[len(everybody) - len(chosen) :])
        assert not chosen or lacking(chosen[: len(chosen) - 1]) > 0
