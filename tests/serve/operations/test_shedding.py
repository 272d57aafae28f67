"""The shedding rule, and the counts that it is given."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.clock import VirtualClock
from armillary.core.units import S
from armillary.serve.operations.occupancy import Occupancy
from armillary.serve.operations.refusal import Refused
from armillary.serve.operations.shedding import Bounds, Load, refusal
from armillary.serve.request import Event, Request, SamplingParams

BOUNDS = Bounds(queue=10, blocks=100, pools=2.0, wait=5.0)


@pytest.mark.parametrize(
    ("load", "requests", "blocks", "said"),
    [
        (Load(9, 9), 1, 1, None),
        (Load(10, 10), 1, 1, "10 requests wait and 1 more would pass the bound of 10"),
        (Load(8, 8), 3, 3, "8 requests wait and 3 more"),
        (Load(3, 195), 1, 5, None),
        (Load(3, 195), 1, 6, "195 KV blocks and this one 6 more; the bound is 200, 2 times the pool"),
        (Load(0, 0), 1, 500, None),  # nobody waits: admission alone judges what it asks for
        (Load(5, 5, 1.0), 1, 1, None),
        (Load(6, 6, 1.0), 1, 1, "6 requests wait and 1 end a second, so the wait would be 6.0 s; the bound is 5 s"),
        (Load(6, 6, None), 1, 1, None),  # nothing measured, nothing expected
    ],
)
def test_the_rule_names_its_numbers(load, requests, blocks, said):
    refused = refusal(load, requests, blocks, BOUNDS)
    if said is None:
        assert refused is None
    else:
        assert refused is not None
        assert said in str(refused)
        assert refused.code == "overloaded"


@given(st.integers(0, 50), st.integers(0, 500), st.none() | st.floats(0.001, 1e3), st.integers(1, 8), st.integers(1, 200))
def test_more_load_never_opens_the_door(waiting, blocks, rate, requests, wanted):
    def taken(more: int) -> bool:
        return refusal(Load(waiting + more, blocks + more, rate), requests, wanted, BOUNDS) is None

    assert taken(0) >= taken(1)
    refused = refusal(Load(waiting, blocks, rate), requests, wanted, BOUNDS)
    if refused is not None:
        assert 1 <= refused.retry_after <= 60


def request(number: int, prompt: int = 10, most: int = 6) -> Request:
    return Request(str(number), tuple(range(prompt)), SamplingParams(max_tokens=most), arrival=0)


def end(one: Request) -> Event:
    return Event(one.id, None, "", None, "stop", 0)


def test_the_expected_wait_is_littles_law_over_busy_time():
    """Two end a second; an idle hour changes nothing."""
    clock = VirtualClock()
    occupancy = Occupancy(clock, 16, BOUNDS)
    for number in range(20):
        one = request(number)
        occupancy.submitted(one)
        clock.advance(S // 2)
        occupancy.event(one, end(one))
        clock.advance(3600 * S)
    assert occupancy.load().completions_per_second == pytest.approx(2.0)
    waiting = [request(100 + number) for number in range(7)]
    for one in waiting:
        occupancy.submitted(one)
    assert occupancy.load().expected_wait == pytest.approx(3.5)
    clock.advance(100 * S)  # nothing ends any more: the forecast follows
    assert occupancy.load().expected_wait > 3.5
    with pytest.raises(Refused, match=r"the bound is 5 s"):
        occupancy.admit([request(200)])


def test_those_that_run_by_now_do_not_count_as_waiting():
    occupancy = Occupancy(VirtualClock(), 16, Bounds(queue=2, blocks=100))
    first, second = request(1), request(2)
    occupancy.submitted(first)
    occupancy.submitted(second)
    with pytest.raises(Refused):
        occupancy.admit([request(3)])
    first.first_scheduled = 1
    occupancy.admit([request(3)])
    assert occupancy.load().waiting == 1


def test_the_books_are_even_after_any_history():
    draw, clock = random.Random(3), VirtualClock()
    occupancy = Occupancy(clock, 16, Bounds(queue=10**6, blocks=10**6))
    alive: list[Request] = []
    for number in range(3_000):
        clock.advance(draw.randrange(S))
        match draw.randrange(4):
            case 0 | 1:
                alive.append(request(number, draw.randrange(1, 60), draw.randrange(60)))
                occupancy.admit([alive[-1]])
                occupancy.submitted(alive[-1])
            case 2 if alive:
                draw.choice(alive).first_scheduled = clock.now()
            case 3 if alive:
                gone = alive.pop(draw.randrange(len(alive)))
                occupancy.event(gone, end(gone))
        stranger = request(-1)  # of a group that was refused as a whole
        occupancy.event(stranger, end(stranger))
        waiting = [one for one in alive if one.first_scheduled is None]
        load = occupancy.load()
        assert len(waiting) <= load.waiting <= len(alive)
        assert load.waiting_blocks >= sum(math.ceil(one.max_length / 16) for one in waiting)
    for one in alive:
        occupancy.event(one, end(one))
    assert (occupancy.load().waiting, occupancy.load().waiting_blocks) == (0, 0)
