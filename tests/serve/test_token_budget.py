"""The token budget that is found from a target: monotone, in bounded steps, and right where the cost is known."""

from hypothesis import given, settings
from hypothesis import strategies as st
from laws import request
from timed import TimedExecutor, linear_cost, replay

from armillary.core.clock import VirtualClock
from armillary.core.units import MS
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.iteration_times import IterationTimes
from armillary.serve.policies.token_budget import MARGIN, TILE, tokens_within
from armillary.serve.schedule import Reason

POINTS = st.lists(st.tuples(st.integers(1, 4096), st.integers(1, 10**6)), max_size=24)


@given(POINTS, st.integers(1, 10**6), st.integers(1, 10**6))
def test_more_time_never_means_fewer_tokens(measured, target, more):
    assert tokens_within(target, measured) <= tokens_within(target + more, measured)


@given(POINTS, st.integers(1, 10**6), st.integers(2, 20))
def test_a_slower_machine_never_gets_more(measured, target, times):
    slower = [(tokens, duration * times) for tokens, duration in measured]
    assert tokens_within(target, slower) <= tokens_within(target, measured)


@given(POINTS, st.integers(1, 10**6))
def test_it_is_whole_tiles_and_at_most_double_of_what_was_tried(measured, target):
    tokens = tokens_within(target, measured)
    assert tokens % TILE == 0
    assert TILE <= tokens <= max([TILE, *(2 * tried for tried, _ in measured)])


@given(st.integers(0, 30 * MS), st.integers(1_000, MS), st.integers(1, 64), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_it_converges_to_the_closed_form_and_overshoots_by_no_more_than_it_tries(fixed, each, decodes, start):
    """An iteration takes fixed + each x tokens, so the answer is (target - fixed) / each, whatever was tried before."""
    target, times = 50 * MS, IterationTimes()
    within = target - target // MARGIN
    answer = max(TILE, (within - fixed) // each // TILE * TILE)
    times.note(start, fixed + each * start)
    for _ in range(40):
        tokens = max(tokens_within(target, times.recent()), decodes + TILE)
        duration = fixed + each * tokens
        if start <= answer and decodes + TILE <= answer:
            assert duration <= within + 2 * TILE * each
        times.note(tokens, duration)
    if answer < 100_000 and decodes + TILE <= answer:
        assert abs(tokens - answer) <= max(2 * TILE, answer // 25)


@given(st.integers(0, 3), st.lists(st.integers(50, 10_000), min_size=1, max_size=3))
def test_a_hiccup_is_forgotten(where, hiccups):
    target, times = 50 * MS, IterationTimes()

    def cost(tokens):
        return 5 * MS + tokens * MS // 10

    for step in range(80):
        tokens = tokens_within(target, times.recent())
        times.note(tokens, cost(tokens) if step not in range(20 + where, 20 + where + len(hiccups)) else hiccups[step - 20 - where] * MS)
    assert cost(tokens) >= 0.9 * (target - target // MARGIN) - cost(TILE) + cost(0)


def test_a_long_run_of_small_iterations_forgets_no_large_one():
    times = IterationTimes()
    times.note(512, 40 * MS)
    for _ in range(1000):
        times.note(8, 10 * MS)
    assert (512, 40 * MS) in times.recent()
    assert len(times.recent()) == 5
    assert 480 <= tokens_within(45 * MS, times.recent()) <= 512


def gaps_of(target, cost, budget=4096):
    """Eight sequences decode and long prompts arrive among them: every time between two tokens, the iterations' sizes, the engine."""
    clock, gaps, last, sizes = VirtualClock(), [], {}, []

    def noted(plan):
        sizes.append(plan.schedule.tokens)
        return cost(plan)

    engine = Engine(
        TimedExecutor(clock, token=lambda request, position: 0, cost=noted),
        EngineConfig(kv_blocks=4096, max_batch_tokens=budget, tbt_target=target, prefix_cache="off"),
        clock=clock,
    )
    requests = [request(f"decode {i}", [i], 400, ignore_eos=True) for i in range(8)]
    requests += [request(f"prompt {i}", range(3000), 20, ignore_eos=True) for i in range(6)]

    def told(event):
        if event.request_id in last:
            gaps.append(event.at - last[event.request_id])
        last[event.request_id] = event.at

    for place, made in enumerate(requests):
        made.arrival = 0 if place < 8 else (place - 7) * 500 * MS
        made.on_event = told
    replay(engine, clock, requests)
    return sorted(gaps), sizes, engine


def test_in_the_engine_tokens_come_within_the_target_and_prompts_are_not_starved():
    cost = linear_cost(10 * MS, MS / 10, 200)  # 40 ms would be 260 tokens, less what attention reads
    gaps, sizes, engine = gaps_of(40 * MS, cost)
    assert gaps[-1] <= 40 * MS
    assert 180 <= max(sizes) <= 260
    unbounded, _, _ = gaps_of(None, cost)
    assert unbounded[-1] > 300 * MS
    assert any(str(Reason.NO_TIME) in line or "chunk" in line for line in engine.explain("prompt 5"))


def test_a_target_that_decodes_alone_exceed_leaves_prompts_a_tile():
    gaps, _, engine = gaps_of(1 * MS, linear_cost(10 * MS, MS / 10))
    assert engine.stats.finished["length"] == 14
    assert gaps[-1] <= 10 * MS + (14 + TILE) * MS / 10


def test_the_upper_bound_stays_the_upper_bound():
    _, sizes, _ = gaps_of(1000 * MS, linear_cost(10 * MS, MS / 10), budget=128)
    assert max(sizes) == 128
