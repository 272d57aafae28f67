"""Whatever arrives, leaves or fails, under every policy: each request's tokens are those of the plainest loop."""

import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule
from laws import EOS, Guesser, Lawful, TableExecutor, plain_loop, request
from timed import replay

from armillary.core.errors import InputError
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.policies import orders

SHAPE = st.tuples(st.lists(st.integers(0, 49), min_size=1, max_size=12), st.integers(0, 30), st.sampled_from([True, True, False]))


class EngineMachine(RuleBasedStateMachine):
    requests = Bundle("requests")
    policy = "sarathi"
    composition = ("fcfs", "last", None)

    @initialize(
        block_size=st.sampled_from([1, 4, 16, 64]),
        capacity=st.integers(24, 70),
        budget=st.integers(3, 40),
        max_running=st.integers(2, 8),
        drafts=st.sampled_from([None, 0, 1, 5]),
        asynchronous=st.sampled_from(["off", "on"]),
    )
    def start(self, block_size, capacity, budget, max_running, drafts, asynchronous):
        config = EngineConfig(
            block_size=block_size,
            kv_blocks=-(-capacity // block_size) + (block_size == 64),
            max_batch_tokens=budget,
            max_running=max_running,
            max_queue=1000,
            async_scheduling=asynchronous,
        )
        drafter = Guesser(budget, drafts, 0.3) if drafts is not None else None
        self.executor = TableExecutor(block_size)
        self.watched = Lawful(policies.get(self.policy, *self.composition), *self.composition)
        self.engine = Engine(self.executor, config, clock=self.executor.clock, eos_ids=[EOS], policy=self.watched, drafter=drafter)
        self.events = {}
        self.all = []
        self.failed = set()

    @rule(target=requests, shapes=st.lists(SHAPE, min_size=1, max_size=6))
    def submit(self, shapes):
        made = [self._submit(*shape) for shape in shapes]
        return multiple(*[one for one in made if one is not None])

    @rule(target=requests, shape=SHAPE, n=st.integers(2, 4))
    def submit_choices(self, shape, n):
        parent = self._submit(*shape)
        return multiple(*[self._submit(*shape, parent=parent) for _ in range(n - 1)], parent) if parent is not None else multiple()

    def _submit(self, prompt, max_tokens, ignore_eos, parent=None):
        made = request(f"r{len(self.all)}", prompt, max_tokens, ignore_eos=ignore_eos)
        made.parent = parent
        made.on_event = self.events.setdefault(made.id, []).append
        if self.engine.limits.blocks_for(made.max_length) > self.engine.limits.total_blocks:
            with pytest.raises(InputError, match=f"the pool has {self.engine.limits.total_blocks}"):
                self.engine.submit(made)
            return None
        self.engine.submit(made)
        self.all.append(made)
        return made

    @rule(victim=requests)
    def cancel(self, victim):
        alive = victim.finish_reason is None
        assert self.engine.cancel(victim.id) is alive
        assert victim.finish_reason is not None
        assert victim.blocks == []

    @rule(victim=requests)
    def cancel_in_flight(self, victim):
        """From another thread's point of view: while the executor works on it."""
        planned = []

        def interrupt(plan):
            planned.extend(plan.requests)
            assert self.engine.cancel(victim.id) is (victim.finish_reason is None)

        self.executor.on_run = interrupt
        self.engine.step()
        self.executor.on_run = None
        if planned:
            assert victim.finish_reason is not None
            assert victim.blocks == []

    @precondition(lambda self: self.all)
    @rule()
    def executor_fails(self):
        self.executor.fail = True
        victims = []
        self.executor.on_run = lambda plan: victims.extend(plan.requests)
        self.engine.step()
        self.executor.fail, self.executor.on_run = False, None
        for victim in victims:
            assert victim.finish_reason == "error"
            assert isinstance(self.events[victim.id][-1].error, MemoryError)

    @rule(count=st.integers(1, 25))
    def steps(self, count):
        for _ in range(count):
            self.engine.step()
            self.engine.check()

    @invariant()
    def memory_is_accounted_for(self):
        if hasattr(self, "engine"):
            self.engine.check()
            blocks = self.engine.snapshot()["blocks"]
            assert blocks["used"] == len({block for r in self.all for block in r.blocks})

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        bound = self.engine.stats.iterations + self.engine.stats.failed_iterations + sum(r.max_length for r in self.all)
        self.engine.run_until_idle()  # nobody starves: the oldest request advances in every iteration
        assert self.engine.stats.iterations <= bound
        assert self.engine.snapshot()["blocks"]["used"] == 0
        for made in self.all:
            self._has_ended_well(made)
        if self.policy in ("orca", "request-level"):
            assert self.engine.stats.preemptions == 0
        assert sum(self.engine.stats.finished.values()) == len(self.all)

    def _has_ended_well(self, made):
        expected = plain_loop(made.prompt, made.sampling.max_tokens, eos=() if made.sampling.ignore_eos else (EOS,))
        events = self.events[made.id]
        assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
        assert events[-1].finish_reason == made.finish_reason
        announced = [event.token for event in events if event.token is not None]
        if made.finish_reason in ("stop", "length"):
            assert made.output == announced == expected
            ended_early = EOS in expected and not made.sampling.ignore_eos
            assert made.finish_reason == ("stop" if ended_early else "length")
        else:
            assert made.output == expected[: len(made.output)]


def machine(name, *composition, max_examples=60):
    case = type(name.title(), (EngineMachine,), {"policy": name} | ({"composition": composition} if composition else {})).TestCase
    case.settings = settings(max_examples=max_examples, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck))
    return case


TestSarathi = machine("sarathi")
TestVLLM = machine("vllm")
TestOrca = machine("orca")
TestRequestLevel = machine("request-level")
TestComposed = machine("sarathi", "sjf", "cost", 20, max_examples=30)


@given(
    name=st.sampled_from(policies.names()),
    block_size=st.sampled_from([1, 4, 16, 64]),
    spare=st.integers(0, 30),
    budget=st.integers(1, 24),
    max_running=st.integers(1, 8),
    shapes=st.lists(st.tuples(st.integers(0, 60), SHAPE), min_size=1, max_size=12),
    drafts=st.sampled_from([None, 2, 7]),
    asynchronous=st.sampled_from(["off", "on"]),
    order=st.sampled_from(["fcfs", *orders.NAMES]),
    victim=st.sampled_from(["last", "cost"]),
    max_wait=st.sampled_from([None, 0, 10]),
    tbt_target=st.sampled_from([None, None, 1, 20]),
)
@settings(max_examples=400, deadline=None)
def test_memory_pressure_and_late_arrivals_change_no_token(
    name, block_size, spare, budget, max_running, shapes, drafts, asynchronous, order, victim, max_wait, tbt_target
):
    victim = victim if name in ("sarathi", "vllm") else "last"
    requests = [request(f"r{i}", prompt, most, ignore_eos=ignore) for i, (_, (prompt, most, ignore)) in enumerate(shapes)]
    for made, (arrival, _) in zip(requests, shapes, strict=True):
        made.arrival = arrival
        made.priority = len(made.prompt) % 3 - 1 if order == "priority" else 0
        made.deadline = arrival + 7 * made.sampling.max_tokens % 50 if order == "deadline" and len(made.prompt) % 4 else None
    blocks = -(-(max(made.max_length for made in requests) + spare) // block_size)  # often just enough for the longest
    config = EngineConfig(
        block_size=block_size,
        kv_blocks=blocks,
        max_batch_tokens=budget,
        max_running=max_running,
        async_scheduling=asynchronous,
        order=order,
        max_wait=max_wait,
    )
    executor = TableExecutor(block_size)
    drafter = Guesser(budget, drafts, 0.2) if drafts is not None else None
    policy = policies.get(name, order, victim, max_wait, tbt_target if name == "sarathi" else None)
    engine = Engine(executor, config, clock=executor.clock, eos_ids=[EOS], policy=Lawful(policy, order, victim, max_wait), drafter=drafter)
    replay(engine, executor.clock, requests)
    for made in requests:
        assert made.output == plain_loop(made.prompt, made.sampling.max_tokens, eos=() if made.sampling.ignore_eos else (EOS,))
    if asynchronous == "on" and drafter is None:
        event("foreseen" if engine.stats.foreseen_schedules else "never foreseen")
    event("preempted" if engine.stats.preemptions else "never preempted")
    assert engine.stats.iterations <= sum(made.max_length for made in requests)
