"""What each policy promises: goldens from the papers, decision equality with vLLM's loop, reasons for who waits."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from laws import TableExecutor, request
from timed import TimedExecutor, replay

from armillary.core.clock import VirtualClock
from armillary.core.errors import NotFoundError
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.schedule import Entry, Hold, Limits, Preemption, Reason, Schedule, State
from armillary.serve.verify import ScheduleError, verify


def sequence(name, prompt, output=0, computed=None, blocks=(), max_tokens=100):
    """A request in the middle of its life."""
    made = request(name, range(prompt), max_tokens)
    made.output = list(range(output))
    made.computed = computed if computed is not None else made.known - 1
    made.blocks = list(blocks)
    return made


def state(waiting=(), running=(), free=100, block_size=4, budget=16, max_running=8):
    total = free + sum(len(r.blocks) for r in running)
    return State(0, tuple(waiting), tuple(running), free, Limits(block_size, total, budget, max_running))


def decoding(name, known, block_size=4):
    return sequence(name, 2, known - 2, blocks=range(-(-(known - 1) // block_size)))


def fresh(name, prompt, max_tokens=8):
    return sequence(name, prompt, computed=0, max_tokens=max_tokens)


def latencies(policy, lengths, max_running):
    clock = VirtualClock()
    engine = Engine(TimedExecutor(clock), EngineConfig(policy=policy, kv_blocks=64, max_running=max_running), clock=clock)
    requests = [request(i, (1,), length) for i, length in enumerate(lengths)]
    replay(engine, clock, requests)
    return [r.finished for r in requests]


def test_golden_request_level_returns_the_batch_together_and_iteration_level_each_when_it_ends():
    assert sum(latencies("request-level", (2, 5, 9), 3)) / 3 == 9
    assert sum(latencies("orca", (2, 5, 9), 3)) / 3 == 16 / 3


@given(st.lists(st.integers(1, 20), min_size=1, max_size=12), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_closed_forms_of_completion_times_at_unit_cost(lengths, seats):
    """Iteration level: a list schedule over `seats` machines. Request level: batches of `seats`, each as long as its longest."""
    machines, expected = [0] * seats, []
    for length in lengths:
        seat = machines.index(min(machines))
        machines[seat] += length
        expected.append(machines[seat])
    for policy in ("orca", "vllm", "sarathi"):
        assert latencies(policy, lengths, seats) == expected
    end, batches = 0, []
    for start in range(0, len(lengths), seats):
        end += max(lengths[start : start + seats])
        batches += [end] * len(lengths[start : start + seats])
    assert latencies("request-level", lengths, seats) == batches


def test_sarathi_gives_decodes_first_then_the_begun_prompt_then_whoever_is_new():
    begun = sequence("begun", 30, computed=10, blocks=range(10, 18))
    got = policies.get("sarathi").step(state([fresh("new", 9), fresh("last", 5)], [decoding("a", 6), begun, decoding("b", 9)], budget=24))
    assert [(e.request_id, e.start, e.count, e.reason) for e in got.entries] == [
        ("a", 5, 1, Reason.DECODE),
        ("b", 8, 1, Reason.DECODE),
        ("begun", 10, 20, Reason.PROMPT),
        ("new", 0, 2, Reason.CHUNK),
    ]
    assert [e.sample for e in got.entries] == [True, True, True, False]
    assert got.entries[3].blocks == 3  # of the whole prompt
    assert got.held == (Hold("last", Reason.NO_BUDGET),)


def test_orca_runs_a_whole_prompt_or_nothing_and_one_above_the_budget_alone():
    orca = policies.get("orca")
    got = orca.step(state([fresh("long", 40), fresh("short", 2)], [decoding("a", 6)]))
    assert [e.request_id for e in got.entries] == ["a"]
    assert got.held == (Hold("long", Reason.NO_BUDGET),)
    alone = orca.step(state([fresh("long", 40), fresh("short", 2)]))
    assert [(e.request_id, e.count, e.blocks) for e in alone.entries] == [("long", 40, 12)]


def test_blocks_that_a_victim_gives_back_serve_the_same_iteration():
    for name in ("vllm", "sarathi"):
        got = policies.get(name).step(state([fresh("new", 1)], [decoding("old", 5), decoding("young", 9)], free=0))
        assert got.preempted == (Preemption("young", Reason.MAKE_ROOM, 2),)
        assert [(e.request_id, e.blocks) for e in got.entries] == [("old", 2)]
        assert got.held == (Hold("new", Reason.NO_BLOCKS),)


def test_a_preempted_sequence_says_that_it_recomputes():
    back = fresh("back", 5)
    back.output, back.preemptions = [1, 2, 3], 1
    for name in ("vllm", "sarathi"):
        (entry,) = policies.get(name).step(state([back])).entries
        assert (entry.start, entry.count, entry.sample, entry.reason) == (0, 8, True, Reason.RECOMPUTE)


@pytest.mark.parametrize(
    ("policy", "arguments", "reason"),
    [
        ("sarathi", {"max_running": 1}, Reason.NO_SEAT),
        ("vllm", {"max_running": 1}, Reason.NO_SEAT),
        ("orca", {"max_running": 1}, Reason.NO_SEAT),
        ("sarathi", {"free": 1}, Reason.NO_BLOCKS),
        ("vllm", {"free": 1}, Reason.NO_BLOCKS),
        ("orca", {"free": 2}, Reason.NO_BLOCKS),
        ("sarathi", {"budget": 1}, Reason.NO_SEAT),
        ("request-level", {}, Reason.BATCH_CLOSED),
    ],
)
def test_who_waits_is_told_why(policy, arguments, reason):
    got = policies.get(policy).step(state([fresh("new", 6), fresh("behind", 1)], [decoding("a", 6)], **arguments))
    assert got.held == (Hold("new", reason),)


def vllm_v1(waiting, running, free, limits):
    """vLLM v1's `Scheduler.schedule`, transcribed from the description of its source: (tokens by request, preempted)."""
    size, budget = limits.block_size, limits.max_batch_tokens
    tokens, preempted = {}, []
    running, owned = list(running), {r.id: len(r.blocks) for r in running}

    def allocate(r, total):  # vLLM: None when there is no room
        nonlocal free
        more = max(0, -(-total // size) - owned.get(r.id, 0))
        if more > free:
            return None
        free -= more
        owned[r.id] = owned.get(r.id, 0) + more
        return more

    index = 0
    while index < len(running) and budget > 0:
        r = running[index]
        wanted = min(r.known - r.computed, budget)
        while True:
            if allocate(r, r.computed + wanted) is not None:
                fits = True
                break
            victim = running.pop()
            free += owned.pop(victim.id)
            preempted.append(victim.id)
            if victim is r:
                fits = False
                break
        if not fits:
            break
        tokens[r.id] = wanted
        budget -= wanted
        index += 1
    if not preempted:
        for r in waiting:
            if budget <= 0 or len(running) == limits.max_running:
                break
            wanted = min(r.known, budget)
            if -(-r.known // size) > free:  # scheduler_reserve_full_isl
                break
            allocate(r, wanted)
            running.append(r)
            tokens[r.id] = wanted
            budget -= wanted
    return tokens, preempted


class CompareWithVLLM:
    name, returns_together, behind = "vllm", False, Reason.QUEUE_ORDER

    def __init__(self):
        self.policy = policies.get("vllm")
        self.compared = 0

    def step(self, seen):
        schedule = self.policy.step(seen)
        tokens, preempted = vllm_v1(seen.waiting, seen.running, seen.free_blocks, seen.limits)
        assert {e.request_id: e.count for e in schedule.entries} == tokens
        assert [p.request_id for p in schedule.preempted] == preempted
        self.compared += 1
        return schedule


@given(
    block_size=st.sampled_from([1, 4, 16]),
    spare=st.integers(0, 20),
    budget=st.integers(4, 32),
    max_running=st.integers(1, 4),  # vLLM itself refuses more seats than budget
    shapes=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 20), st.integers(1, 30)), min_size=1, max_size=10),
)
@settings(max_examples=150, deadline=None)
def test_vllm_decides_as_vllm_v1_does(block_size, spare, budget, max_running, shapes):
    requests = [request(i, range(prompt), length) for i, (_, prompt, length) in enumerate(shapes)]
    for made, (arrival, _, _) in zip(requests, shapes, strict=True):
        made.arrival = arrival
    blocks = -(-(max(r.max_length for r in requests) + spare) // block_size)
    config = EngineConfig(block_size=block_size, kv_blocks=blocks, max_batch_tokens=budget, max_running=max_running, prefix_cache="off")
    executor, compared = TableExecutor(block_size), CompareWithVLLM()
    replay(Engine(executor, config, clock=executor.clock, policy=compared), executor.clock, requests)
    assert compared.compared > 0


def test_the_registry_names_its_policies():
    assert policies.names()[0] == policies.DEFAULT == "sarathi"
    for name in policies.names():
        assert policies.get(name).name == name
    with pytest.raises(NotFoundError, match=r"no scheduler policy is called 'fifo'.*sarathi, vllm, orca, request-level"):
        policies.get("fifo")


GOOD = Entry("new", 0, 6, True, 2, Reason.PROMPT)


@pytest.mark.parametrize(
    ("schedule", "complaint"),
    [
        (Schedule(1, (GOOD,)), "is for iteration 1"),
        (Schedule(0), "runs nothing although there is work"),
        (Schedule(0, (Entry("ghost", 0, 1, True, 1, Reason.PROMPT),)), "'ghost' is scheduled but neither running nor waiting"),
        (Schedule(0, (GOOD, GOOD)), "two entries"),
        (Schedule(0, (Entry("new", 1, 5, True, 2, Reason.PROMPT),)), "starts at 1, its cache ends at 0"),
        (Schedule(0, (Entry("new", 0, 7, True, 2, Reason.PROMPT),)), "computes 7 tokens, 6 are wanted"),
        (Schedule(0, (Entry("new", 0, 0, False, 2, Reason.PROMPT),)), "computes 0 tokens"),
        (Schedule(0, (Entry("new", 0, 5, True, 2, Reason.CHUNK),)), "must sample exactly"),
        (Schedule(0, (Entry("new", 0, 6, True, 1, Reason.PROMPT),)), "owns 1 KV blocks, 2 are needed"),
        (Schedule(0, (Entry("new", 0, 6, True, 9, Reason.PROMPT),)), "needs 6 KV blocks more"),
        (Schedule(0, (GOOD,), (Preemption("new", Reason.MAKE_ROOM, 0),)), "is preempted but is not running"),
        (Schedule(0, (GOOD,), (Preemption("a", Reason.MAKE_ROOM, 7),)), "gives back 2 blocks, not 7"),
        (Schedule(0, (Entry("a", 5, 1, True, 2, Reason.DECODE),), (Preemption("a", Reason.MAKE_ROOM, 2),)), "preempted and scheduled"),
        (Schedule(0, (GOOD, Entry("more", 0, 3, True, 1, Reason.PROMPT))), "3 sequences would run, the bound is 2"),
        (Schedule(0, (Entry("a", 5, 1, True, 2, Reason.DECODE), Entry("new", 0, 6, True, 2, Reason.PROMPT))), "7 tokens, the budget is 6"),
    ],
)
def test_a_defective_schedule_is_refused(schedule, complaint):
    seen = state([fresh("new", 6), fresh("more", 3)], [decoding("a", 6)], free=3, budget=6, max_running=2)
    with pytest.raises(ScheduleError, match=complaint):
        verify(schedule, seen)
