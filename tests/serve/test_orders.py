"""The orders of the queue: goldens of scheduling theory, the bound on waiting, and what those who wait are told."""

import random
from itertools import permutations
from statistics import mean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import Lawful, TableExecutor, request
from timed import TimedExecutor, linear_cost, replay

from armillary.core.clock import VirtualClock
from armillary.core.config import resolve
from armillary.core.errors import InputError, NotFoundError
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.policies import orders
from armillary.serve.schedule import Limits, State


def serve(requests, order, *, cost=None, watch=True, **config):
    """Run to the end in virtual time: an iteration takes 1 ns unless `cost` says otherwise."""
    clock = VirtualClock()
    config = EngineConfig(**{"order": order, "kv_blocks": 4096, "max_running": 1, "max_wait": None} | config)
    policy = policies.get(config.policy, *config.composition)
    watched = Lawful(policy, order, config.victim, config.max_wait) if watch else policy
    engine = Engine(TimedExecutor(clock, cost=cost), config, clock=clock, policy=watched)
    replay(engine, clock, requests)
    return engine


def jobs(lengths, arrivals=None):
    made = [request(i, (i,), length, ignore_eos=True) for i, length in enumerate(lengths)]
    for one, arrival in zip(made, arrivals or [0] * len(made), strict=True):
        one.arrival = arrival
    return made


def latencies(requests):
    return [made.finished - made.arrival for made in requests]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_shortest_job_first_has_the_least_mean_latency_of_all_orders(lengths):
    requests = jobs(lengths)
    serve(requests, "sjf")
    best = min(mean(sum(order[: i + 1]) for i in range(len(order))) for order in permutations(lengths))
    assert mean(latencies(requests)) == pytest.approx(best)


def test_golden_shortest_job_first():
    fcfs, sjf = jobs([9, 5, 2]), jobs([9, 5, 2])
    serve(fcfs, "fcfs")
    serve(sjf, "sjf")
    assert (mean(latencies(fcfs)), mean(latencies(sjf))) == (39 / 3, 25 / 3)


def test_the_length_of_an_answer_is_its_bound_up_to_what_conversations_come_to():
    chat, long_prompt, short = request("chat", range(10), 8000), request("long", range(300), 8), request("short", range(200), 8)
    state = State(0, [chat, long_prompt, short], (), 100, Limits(16, 100, 512, 8))
    assert [made.id for made in orders.get("sjf").waiting(state)] == ["short", "chat", "long"]  # 208, 10 + 256 and 308 tokens


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_earliest_deadline_first_meets_all_deadlines_if_any_order_does(shapes):
    """One seat, an iteration a token: job i takes l_i, and its first token is there one after it begins."""
    requests = jobs([length for length, _ in shapes])
    for made, (_, deadline) in zip(requests, shapes, strict=True):
        made.deadline = deadline

    def feasible(order):
        start = 0
        for index in order:
            if start + 1 > shapes[index][1]:
                return False
            start += shapes[index][0]
        return True

    possible = any(feasible(order) for order in permutations(range(len(shapes))))
    by_deadline = sorted(range(len(shapes)), key=lambda index: shapes[index][1])
    serve(requests, "deadline", watch=False)
    met = all(made.first_token <= made.deadline for made in requests)
    assert met or not (possible and feasible(by_deadline))


def test_in_overload_some_deadlines_are_met_where_plain_order_misses_nearly_all():
    """Twice the work that fits: served as they came everybody is late from some time on; with the late put behind, half are in time."""
    met = {}
    for order in ("fcfs", "deadline"):
        requests = jobs([10] * 40, [5 * i for i in range(40)])
        for made in requests:
            made.deadline = made.arrival + 30 if order == "deadline" else None
        serve(requests, order)
        met[order] = sum(made.first_token <= made.arrival + 30 for made in requests)
    assert met["fcfs"] <= 8
    assert met["deadline"] >= 19


def test_priority_classes_go_by_number_and_within_a_class_as_they_came():
    requests = jobs([3] * 6)
    for made, priority in zip(requests, (1, 0, -5, 1, 0, -5), strict=True):
        made.priority = priority
    serve(requests, "priority")
    assert [int(made.id) for made in sorted(requests, key=lambda made: made.first_scheduled)] == [2, 5, 1, 4, 0, 3]


@pytest.mark.parametrize("order", ["sjf", "deadline", "priority", "prefix"])
@given(seed=st.integers(0, 1 << 30))
@settings(max_examples=15, deadline=None)
def test_nobody_waits_longer_than_the_bound_and_what_runs(order, seed):
    """One seat, at most half loaded: past the bound a request waits for the one that runs and for those past it before him."""
    draw = random.Random(seed)
    requests, at = [], 0
    for index in range(60):
        at += draw.randint(2, 16)
        requests.append(request(index, [draw.randrange(3)] * draw.randint(1, 4), draw.randint(1, 8), ignore_eos=True))
        requests[-1].arrival = at
        if order == "priority":
            requests[-1].priority = draw.choice([0, 0, 0, 9])
        if order == "deadline":
            requests[-1].deadline = draw.choice([None, at + 5])
    bound = draw.choice([0, 10, 40])
    serve(requests, order, max_wait=bound)
    for made in requests:
        others = [other for other in requests if other.arrival < made.arrival and other.finished > made.arrival + bound]
        ahead = sum(len(other.output) for other in others)
        running = max(
            (len(other.output) for other in requests if other.first_scheduled <= made.arrival + bound < other.finished), default=0
        )
        assert made.first_scheduled - made.arrival <= bound + 1 + ahead + running


def test_without_the_bound_a_long_job_starves_and_with_it_it_does_not():
    for bound, expected in ((None, 200), (50, 51)):
        long, short = request("long", (1,), 200), jobs([2] * 100, [2 * i for i in range(100)])
        long.arrival = 0
        engine = serve([long, *short], "sjf", max_wait=bound)
        assert abs(long.first_scheduled - expected) <= 2
        told = engine.explain("long")
        assert any("held: behind a shorter request" in words for words in told)
        assert any("waited over the bound" in words for words in told) is (bound is not None)


@pytest.mark.parametrize(
    ("order", "fields", "words"),
    [
        ("fcfs", {}, None),
        ("sjf", {}, "behind a shorter request"),
        ("deadline", {"deadline": 10}, "behind a request that is due earlier"),
        ("priority", {"priority": -1}, "behind a request of a higher priority"),
    ],
)
def test_who_waits_is_told_behind_whom(order, fields, words):
    clock = VirtualClock()
    engine = Engine(TimedExecutor(clock), EngineConfig(order=order, kv_blocks=64, max_running=1), clock=clock)
    engine.submit(request("runs", (1,), 2))
    engine.step()
    engine.submit(request("first", range(9), 50))
    for number in range(2):
        preferred = request(f"preferred {number}", range(2), 5)
        for name, value in fields.items():
            setattr(preferred, name, value)
        engine.submit(preferred)
    engine.submit(request("last", range(30), 50))
    for _ in range(3):
        engine.step()
    rows = {row["id"]: row["held"] for row in engine.snapshot()["requests"]}
    assert any(f"held: {words}" in line for line in engine.explain("first")) is (order != "fcfs")
    assert rows["last"] == (words if order != "fcfs" else "behind an earlier request")


# -- the longest prefix: section 13's goldens ------------------------------------------------------------------------


def branches(count, each, stem=64, own=8):
    """`each` requests for each of `count` stems: the leaves of a tree of depth 2."""
    draw = random.Random(1)
    stems = [[draw.randrange(50) for _ in range(stem)] for _ in range(count)]
    made = [(name, [*stems[name], *[draw.randrange(50) for _ in range(own)]]) for name in range(count) for _ in range(each)]
    return [prompt for _, prompt in made]


def reused(prompts, order, cache_tokens, **config):
    """Share of the prompts' tokens that the cache had, one at a time, in a pool of `cache_tokens`."""
    executor = TableExecutor(8)
    config = EngineConfig(order=order, block_size=8, kv_blocks=cache_tokens // 8, max_running=1, max_wait=None, **config)
    engine = Engine(executor, config, clock=executor.clock, policy=Lawful(policies.get("sarathi", order), order))
    for index, prompt in enumerate(prompts):
        engine.submit(request(index, prompt, 1))
    engine.run_until_idle()
    return engine.stats.reused_tokens / sum(map(len, prompts))


def test_with_a_cache_of_one_branch_random_order_has_hits_by_chance_and_the_longest_prefix_has_all_of_them():
    prompts = branches(6, 8)
    random.Random(0).shuffle(prompts)
    optimum = (48 - 6) * 64 / (48 * 72)  # each stem is computed once
    assert reused(prompts, "prefix", 80) == pytest.approx(optimum)
    assert reused(prompts, "fcfs", 80) < 0.35 * optimum
    assert reused(prompts, "prefix", 4096) == pytest.approx(reused(prompts, "fcfs", 4096)) == pytest.approx(optimum)


def tree_cost(prompts, block=8):
    """Blocks of a radix tree of the prompts: what the best order computes, for each node is computed at least once (theorem 3.1)."""
    nodes, computed = set(), 0
    for prompt in prompts:
        shared = (len(prompt) - 1) // block * block  # at least one token is computed
        tail = len(prompt) - shared
        for end in range(block, shared + 1, block):
            if tuple(prompt[:end]) not in nodes:
                nodes.add(tuple(prompt[:end]))
                computed += block
        computed += tail
    return computed


@given(st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_the_longest_prefix_is_depth_first_and_optimal_where_the_cache_holds_the_longest_request(seed):
    draw = random.Random(seed)
    prompts = []
    for first in range(draw.randint(1, 3)):
        for second in range(draw.randint(1, 3)):
            for third in range(draw.randint(1, 3)):
                prompts.append([first] * 8 + [10 + second] * 8 + [20 + third] * 8 + [5])
    draw.shuffle(prompts)
    share = reused(prompts, "prefix", 32)  # four blocks: exactly one request
    assert (1 - share) * sum(map(len, prompts)) == pytest.approx(tree_cost(prompts))


def test_a_stranger_does_not_wait_for_the_end_of_a_popular_prompt():
    for bound, last in ((None, True), (100, False)):
        stem = list(range(64))
        popular = [request(i, [*stem, 100 + i], 4, ignore_eos=True) for i in range(40)]
        for i, made in enumerate(popular):
            made.arrival = 4 * i
        stranger = request("stranger", range(1000, 1064), 4, ignore_eos=True)
        stranger.arrival = 5
        serve([*popular, stranger], "prefix", max_wait=bound, block_size=8, cost=linear_cost(1, 0))
        later = [made for made in popular if made.first_scheduled > stranger.first_scheduled]
        assert (not later) is last


# -- what cannot be ----------------------------------------------------------------------------------------------------


def test_what_the_order_would_not_look_at_is_refused_at_the_door():
    clock = VirtualClock()
    engine = Engine(TimedExecutor(clock), EngineConfig(kv_blocks=64), clock=clock)
    urgent, due = request("urgent", (1,), 1), request("due", (1,), 1)
    urgent.priority, due.deadline = -1, 5
    with pytest.raises(InputError, match=r"priority -1.*order is fcfs.*--order priority"):
        engine.submit(urgent)
    with pytest.raises(InputError, match=r"first token is wanted by a time.*order is fcfs.*--order deadline"):
        engine.submit(due)


def test_compositions_that_mean_nothing_are_refused():
    with pytest.raises(NotFoundError, match="'sjf' is an order of the queue: --order sjf"):
        policies.get("sjf")
    with pytest.raises(NotFoundError, match=r"no order of the queue is called 'lifo'.*fcfs, sjf, deadline, priority, prefix"):
        policies.get("sarathi", "lifo")
    with pytest.raises(NotFoundError, match=r"no choice of victims is called 'random'.*last, cost"):
        policies.get("sarathi", victim="random")
    for flags, words in (
        ({"policy": "orca", "victim": "cost"}, "'orca' reserves memory and never preempts"),
        ({"policy": "vllm", "tbt_target": "50ms"}, "the policy 'vllm' does not chunk them to a time"),
        ({"max_wait": "soon"}, "'soon' is not a duration"),
    ):
        with pytest.raises(InputError, match=words):
            resolve(EngineConfig, environment={}, flags=flags)


def test_times_are_written_with_their_unit_wherever_they_come_from(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('tbt_target = "1.5 s"\norder = "sjf"\nvictim = "cost"\n', encoding="utf-8")
    settled = resolve(EngineConfig, file=file, environment={"ARMILLARY_MAX_WAIT": "none"})
    assert (settled.value.tbt_target, settled.value.max_wait) == (1_500_000_000, None)
    assert settled.value.scheduling == "sarathi, order sjf, victim by cost, 1.5 s between tokens"
    settled.save(file)
    assert resolve(EngineConfig, file=file, environment={}).value == settled.value
    assert EngineConfig().scheduling == "sarathi"
    assert EngineConfig().max_wait == 60_000_000_000


def test_every_order_is_known_by_its_name():
    for name in orders.NAMES:
        assert orders.get(name) is not None
        for policy in policies.names():
            assert policies.get(policy, name).name == policy
