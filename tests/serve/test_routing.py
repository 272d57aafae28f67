"""Who gets a request: laws of each routing policy, of hedging and of probation."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import NotFoundError
from armillary.serve.policies import routing
from armillary.serve.policies.routing.hedging import HedgeState, Hedging
from armillary.serve.policies.routing.probation import Probation, Pulse
from armillary.serve.policies.routing.state import ReplicaView, RouteState

views = st.builds(ReplicaView, st.just(0), *[st.integers(0, 50)] * 2, *[st.integers(0, 5000)] * 2, st.integers(0, 100))


@st.composite
def states(draw):
    found = draw(st.lists(views, min_size=1, max_size=8))
    indices = sorted(draw(st.sets(st.integers(0, 30), min_size=len(found), max_size=len(found))))
    placed = tuple(
        ReplicaView(i, v.waiting, v.running, v.queued_tokens, v.cached_tokens, v.matched) for i, v in zip(indices, found, strict=True)
    )
    return RouteState(draw(st.text(max_size=5)), draw(st.text(max_size=5)), draw(st.integers(1, 100)), placed, draw(st.integers(0, 1000)))


@given(states(), st.sampled_from(routing.names()))
def test_a_route_is_a_function_of_the_state_to_one_of_its_replicas_with_a_reason(state, name):
    route = routing.get(name).step(state)
    assert route == routing.get(name).step(state)
    assert route.replica in {view.index for view in state.replicas}
    assert str(route.replica) in route.reason or "only one" in route.reason


def test_an_unknown_router_is_named():
    with pytest.raises(NotFoundError, match="power-of-two"):
        routing.get("fastest")


def fill(policy, replicas, requests, rng=None):
    """The longest queue when `requests` come and none ends; `rng` chooses instead of the policy."""
    waiting = [0] * replicas
    for number in range(requests):
        if rng is not None:
            waiting[rng.randrange(replicas)] += 1
            continue
        state = RouteState(str(number), "", 1, tuple(ReplicaView(i, count) for i, count in enumerate(waiting)), number)
        waiting[policy.step(state).replica] += 1
    return max(waiting)


def test_two_choices_keep_the_longest_queue_at_lnln_n():
    """n requests on n replicas: ln n / ln ln n (1 + o(1)) at random, ln ln n / ln 2 + O(1) with two choices."""
    n = 400
    by_chance = fill(None, n, n, random.Random(0))
    assert by_chance >= 5
    assert fill(routing.get("power-of-two"), n, n) <= 3 < by_chance
    assert fill(routing.get("round-robin"), n, n) == fill(routing.get("shortest-queue"), n, n) == 1


def test_a_lost_replica_moves_its_own_sessions_only():
    policy, all_of_them = routing.get("consistent-hash"), tuple(map(ReplicaView, range(5)))
    before = {s: policy.step(RouteState("r", str(s), 1, all_of_them)).replica for s in range(200)}
    after = {s: policy.step(RouteState("r", str(s), 1, all_of_them[:2] + all_of_them[3:])).replica for s in range(200)}
    assert set(before.values()) == set(range(5))
    assert all(after[s] == before[s] for s in before if before[s] != 2)
    assert 2 not in after.values()


def test_cache_aware_follows_the_cache_until_the_load_is_uneven():
    policy = routing.get("cache-aware")

    def route(*replicas, prompt=100):
        return policy.step(RouteState("r", "s", prompt, tuple(ReplicaView(i, **view) for i, view in enumerate(replicas))))

    warm = {"matched": 80, "cached_tokens": 9000}
    assert route({}, warm).replica == 1
    assert "80 of its 100" in route({}, warm).reason
    assert route({}, {**warm, "matched": 50}).replica == 0  # not more than half: the emptier cache
    assert route({}, {**warm, "running": 8}).replica == 1
    overridden = route({}, {**warm, "running": 9})
    assert overridden.replica == 0
    assert "uneven" in overridden.reason
    assert "80 of its 100" in overridden.reason
    assert route({"running": 20}, {**warm, "running": 29}).replica == 1  # 9 more, but not one and a half times


def test_a_hedge_is_late_affordable_and_has_somewhere_to_go():
    late = HedgeState(waited=11, late=10, cost=5, spent=0, admitted=100, utilisation=0.5, free=True)
    decide = Hedging(budget=0.05, utilisation=0.7).step

    def changed(**fields):
        return HedgeState(**{name: getattr(late, name) for name in HedgeState.__slots__} | fields)

    assert decide(late).send
    assert not decide(changed(waited=10)).late
    assert not decide(changed(late=None)).late
    for fields, word in (({"utilisation": 0.71}, "71%"), ({"spent": 1}, "sent twice"), ({"free": False}, "queue")):
        assert decide(changed(**fields)).late
        assert not decide(changed(**fields)).send
        assert word in decide(changed(**fields)).reason


def test_probation_is_for_the_silent_and_for_the_slow_by_evidence():
    rule = Probation(silence=100, factor=3.0, samples=8, sentence=10, longest=70)
    assert rule.step(Pulse(100, 1.0, 50)) == "open"
    assert rule.step(Pulse(101, 1.0, 0)) == "silent"
    assert rule.step(Pulse(0, 3.1, 8)) == "slow"
    assert rule.step(Pulse(0, 9.0, 7)) == "open"
    assert [rule.term(before) for before in range(5)] == [10, 20, 40, 70, 70]
