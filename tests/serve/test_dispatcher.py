"""A fleet in virtual time: tokens are the single engine's, whatever is late, slow, silent or dead, and nothing runs twice that must not."""

import random
from collections import Counter

import pytest
from fleet_world import World
from hypothesis import given, settings
from hypothesis import strategies as st
from timed import linear_cost

from armillary.core.errors import CapacityError, InputError
from armillary.serve.fleet.queueing import hedged_share
from armillary.serve.policies import routing
from armillary.serve.policies.routing.hedging import Hedging
from armillary.serve.policies.routing.probation import Probation


def prompts(count, seed=0, length=(1, 40)):
    rng = random.Random(seed)
    return [[rng.randrange(50) for _ in range(rng.randint(*length))] for _ in range(count)]


def families(world, rng, made, lengths, until):
    """A request for each prompt, of so many tokens at least and at most; two in five are another choice of the answer before."""
    requests, at = [], 0
    for i, prompt in enumerate(made):
        parent = requests[-1] if requests and rng.random() < 0.4 else None
        at = rng.randrange(until) if parent is None else at
        requests.append(world.submit(i, prompt if parent is None else parent.prompt, rng.randint(*lengths), at=at, parent=parent))
    return requests


@pytest.mark.parametrize("router", routing.names())
def test_answers_are_the_single_engines_whoever_routes(router):
    world = World({"replicas": 3, "router": router}, eos=(7,))
    requests = [world.submit(i, prompt, 12, at=50 * i) for i, prompt in enumerate(prompts(40))]
    world.run()
    for request in requests:
        world.check(request)
    assert world.dispatcher.finished["stop"] + world.dispatcher.finished["length"] == 40
    assert world.dispatcher.finished["stop"] > 0
    words = world.dispatcher.stories.read("7")
    assert any("sent to replica" in line for line in words)
    assert "ended" in words[-1]


@settings(max_examples=30)
@given(st.integers(0, 1 << 30), st.integers(2, 4))
def test_a_tied_request_starts_once_however_long_messages_take(seed, replicas):
    rng = random.Random(seed)
    world = World({"replicas": replicas, "tail": "tied"}, {"max_running": 2}, delay=lambda: rng.randrange(400))
    requests = families(world, rng, prompts(20, seed), (4, 4), 3000)
    cancelled = [str(i) for i in range(20) if rng.random() < 0.1]
    for name in cancelled:
        world.later(rng.randrange(4000), lambda name=name: world.dispatcher.cancel(name))
    world.run()
    assert world.dispatcher.stats.tied > 0
    starts = sum(replica.engine.stats.finished[reason] for replica in world.replicas for reason in ("stop", "length"))
    assert starts <= 20
    assert len(world.started) <= 20
    assert max(Counter(attempt for _, attempt in world.started).values()) == 1
    for request in requests:
        if request.finish_reason == "cancelled":
            assert request.id in cancelled
            assert request.output == world.expected(request)[: len(request.output)]
        else:
            world.check(request)


@pytest.mark.parametrize("tail", ["none", "hedged", "tied"])
def test_choices_of_an_answer_are_together_and_compute_their_prompt_once(tail):
    world = World({"replicas": 3, "tail": tail}, {"prefix_cache": "off", "max_running": 4})
    made = prompts(6, length=(20, 40))
    answers = []
    for i, prompt in enumerate(made):
        first = world.submit(f"{i}/0", prompt, 6)
        answers.append([first, *(world.submit(f"{i}/{j}", prompt, 6, parent=first) for j in range(1, 4))])
    world.run()
    for answer in answers:
        for request in answer:
            world.check(request)
    engines = [replica.engine for replica in world.replicas]
    assert sum(engine.stats.forked_tokens for engine in engines) == sum(3 * (len(prompt) - 1) for prompt in made)
    computed = sum(engine.stats.scheduled_tokens for engine in engines)
    assert computed == sum(len(prompt) + 3 + 4 * 5 for prompt in made)  # the prompt, its last token for each other, five more for each
    assert all(engine.stats.finished["length"] for engine in engines)
    told = world.dispatcher.stories.read("5/3")
    assert any("where '5/0' has the prompt that they share" in line for line in told)


def test_hedging_at_the_95th_percentile_sends_exactly_what_lies_beyond_it_twice():
    """Each prompt waits as long as its first token says: 1 to 20 in turn, so that 5 % lie beyond the 95th percentile."""
    waits = [1000 * (1 + i % 20) for i in range(400)]

    def cost(plan):
        return max(request.prompt[0] for request in plan.requests)

    world = World({"replicas": 3, "tail": "hedged", "router": "round-robin"}, cost=cost, tick=500, hedging=Hedging(budget=1.0), eos=())
    for i, wait in enumerate(waits):
        world.submit(i, [wait, 1], 1, at=50_000 * i)
    world.run()
    warm = waits[20:]  # before that nobody knows what is late
    assert world.dispatcher.stats.hedges == round(len(warm) * hedged_share(warm, 19_000))
    assert world.dispatcher.stats.hedged_tokens == 2 * world.dispatcher.stats.hedges
    assert world.dispatcher.finished["length"] == 400


def slow_world(**fleet):
    world = World({"replicas": 2, "router": "round-robin", **fleet}, tick=100, hedging=Hedging(budget=1.0))
    for i, prompt in enumerate(prompts(60, length=(8, 8))):
        world.submit(i, prompt, 2, at=2000 * i)
    world.run()
    return world


def test_the_loser_of_a_hedge_is_cancelled_and_none_of_its_tokens_is_streamed():
    world = slow_world(tail="hedged")
    world.replicas[1].slow = 1000.0
    requests = [world.submit(f"late{i}", prompt, 6) for i, prompt in enumerate(prompts(2, 1, length=(8, 8)))]
    world.run()
    for request in requests:
        world.check(request)
    assert world.dispatcher.stats.hedges == world.dispatcher.stats.hedges_won == 1
    told = [line for i in range(2) for line in world.dispatcher.stories.read(f"late{i}")]
    assert any("hedged: no token after" in line for line in told)
    assert any("gave the first token: cancelled on replica 1" in line for line in told)
    assert world.replicas[1].engine.stats.finished["cancelled"] == 1
    assert requests[0].finished < 20_000 + requests[0].arrival


def test_nothing_is_hedged_when_the_seats_are_taken_or_the_budget_is_spent():
    world = slow_world(tail="hedged")
    world.dispatcher.watch.hedging = Hedging(budget=0.0)
    world.replicas[1].slow = 1000.0
    world.submit("a", [1] * 8, 2)
    world.submit("b", [2] * 8, 2)
    world.run()
    assert world.dispatcher.stats.hedges == 0
    assert any("not hedged" in line and "sent twice already" in line for line in world.dispatcher.stories.read("b"))


def test_a_slow_replica_is_on_probation_and_is_tried_again():
    probation = Probation(silence=1 << 60, sentence=400_000)
    world = World({"replicas": 3, "router": "round-robin"}, probation=probation, tick=1000)
    for i, prompt in enumerate(prompts(60, length=(8, 8))):
        world.submit(i, prompt, 2, at=2000 * i)
    world.at(60_000, lambda: setattr(world.replicas[1], "slow", 20.0))
    for i, prompt in enumerate(prompts(150, 2, length=(8, 8))):
        world.submit(f"more{i}", prompt, 2, at=130_000 + 2000 * i)
    world.run(until=420_000)
    slow = world.dispatcher.members[1]
    assert slow.health == "slow"
    assert world.dispatcher.stats.convictions == 1
    world.replicas[1].slow = 1.0
    before = world.replicas[1].engine.stats.generated_tokens
    for i, prompt in enumerate(prompts(100, 3, length=(8, 8))):
        world.submit(f"last{i}", prompt, 2, at=900_000 + 2000 * i)
    world.run()
    assert slow.health == "open"
    assert world.replicas[1].engine.stats.generated_tokens > before
    assert world.dispatcher.stats.convictions == 1


def test_a_silent_replicas_requests_go_to_one_on_probation_where_there_is_no_other():
    world = World({"replicas": 2, "router": "round-robin"}, probation=Probation(silence=5_000, sentence=1 << 40), tick=500)
    requests = [world.submit(i, prompt, 30) for i, prompt in enumerate(prompts(6))]
    world.dispatcher.watch.convict(world.dispatcher.members[0])
    world.at(2_000, world.replicas[1].stop)
    for at in range(0, 60_000, 1_000):
        world.at(at, lambda: world.replicas[0].say({"op": "pulse", "iterations": []}))
    world.run()
    for request in requests:
        world.check(request)
    assert world.dispatcher.stats.moved == 3


@settings(max_examples=25)
@given(st.integers(0, 1 << 30), st.sampled_from(["none", "hedged", "tied"]))
def test_no_admitted_request_is_lost_when_replicas_die_or_fall_silent(seed, tail):
    rng = random.Random(seed)
    world = World(
        {"replicas": 3, "tail": tail},
        {"max_running": 3},
        delay=lambda: rng.randrange(200),
        probation=Probation(silence=20_000, sentence=10_000),
        tick=1000,
    )
    requests = families(world, rng, prompts(25, seed), (10, 10), 20_000)

    def pulse():
        for replica in world.replicas:
            if not replica.stopped and replica.member.link is not None:
                replica.say({"op": "pulse", "iterations": []})
        if world.dispatcher.tickets or world.clock.now() < 20_000:
            world.later(2000, pulse)

    world.later(0, pulse)
    victim = rng.randrange(3)
    if rng.random() < 0.5:
        at = rng.randrange(20_000)
        world.at(at, world.replicas[victim].kill)
        world.at(at + rng.randrange(30_000), world.replicas[victim].restart)
    else:
        at = rng.randrange(20_000)
        world.at(at, world.replicas[victim].stop)
        world.at(at + rng.randrange(60_000), world.replicas[victim].resume)
    world.run()
    for request in requests:
        world.check(request)
    assert world.dispatcher.finished["length"] == 25
    assert world.dispatcher.waiting == 0
    for replica in world.replicas:
        assert not replica.engine.snapshot()["running"]
        assert not replica.host._hosted
        assert replica.host._unstarted == 0


def test_a_request_that_kills_its_replicas_ends_and_the_others_go_on():
    world = World({"replicas": 2})
    poison, other = world.submit("poison", [1, 2], 500), None
    for _ in range(3):
        world.run(until=world.clock.now() + 2000)
        (attempt,) = world.dispatcher.tickets["poison"].attempts
        victim = world.replicas[attempt.member.index]
        victim.kill()
        if other is None:
            other = world.submit("other", [3], 5)
        victim.restart()
    world.run()
    assert poison.finish_reason == "error"
    assert "3 replicas died" in str(world.events["poison"][-1].error)
    world.check(other)


def test_without_any_replica_requests_wait_in_order_and_the_queue_is_bounded():
    world = World({"replicas": 2}, {"max_queue": 3})
    for replica in world.replicas:
        replica.kill()
    requests = [world.submit(i, [i], 2) for i in range(3)]
    with pytest.raises(CapacityError, match="bound of 3"):
        world.submit("more", [1], 1)
    with pytest.raises(InputError, match="already being served"):
        world.submit(0, [1], 1)
    with pytest.raises(InputError, match="KV blocks"):
        world.submit("long", [1] * 5000, 1)
    world.replicas[0].restart()
    world.run()
    for request in requests:
        world.check(request)
    assert [request.first_scheduled for request in requests] == sorted(request.first_scheduled for request in requests)


def sessions(router, rounds=12, count=24):
    """Sessions that come back with all they said before. By their names, most of them belong to one replica of four."""
    rng = random.Random(5)
    world = World(
        {"replicas": 4, "router": router},
        {"kv_blocks": 150, "block_size": 8, "max_batch_tokens": 128},
        cost=linear_cost(1000, 100),
    )
    pinned, histories = routing.get("consistent-hash"), []
    while len(histories) < count:
        history = [rng.randrange(50) for _ in range(64)]
        world.submit("probe", history, 0)
        ticket = world.dispatcher.tickets["probe"]
        state = world.dispatcher.state(ticket, world.dispatcher.members)
        world.dispatcher.cancel("probe")
        if pinned.step(state).replica == 0 or len(histories) % 4 == 3:
            histories.append(history)
    world.run()
    start = world.clock.now()
    sought = [replica.engine.stats.sought_tokens for replica in world.replicas]
    reused = [replica.engine.stats.reused_tokens for replica in world.replicas]
    for turn in range(rounds):
        begun = [world.submit(f"{turn}.{i}", history, 4) for i, history in enumerate(histories)]
        world.run()
        for history, request in zip(histories, begun, strict=True):
            history += [*request.output, *(rng.randrange(50) for _ in range(4))]
    hits = sum(r.engine.stats.reused_tokens - old for r, old in zip(world.replicas, reused, strict=True))
    all_tokens = sum(r.engine.stats.sought_tokens - old for r, old in zip(world.replicas, sought, strict=True))
    return hits / all_tokens, world.clock.now() - start


def test_pinned_sessions_thrash_one_replica_and_cache_aware_routing_with_override_does_not():
    """The incident of a training cluster: sessions pinned by a hash saturated one replica, whose hit rate fell and which was 4 times slower."""
    pinned_hits, pinned_time = sessions("consistent-hash")
    aware_hits, aware_time = sessions("cache-aware")
    assert aware_hits > 0.75
    assert pinned_hits < 0.35
    assert pinned_time > 3 * aware_time
