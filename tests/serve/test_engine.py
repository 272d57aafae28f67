"""How requests begin and end: finish reasons, cancellation, failures, threads, bounds."""

import itertools
import json
import threading
import time

import pytest
from laws import TableExecutor, plain_loop, request
from timed import TimedExecutor, replay

from armillary.core.clock import VirtualClock
from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.core.trace import Trace
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.request import Request, SamplingParams, TokenLogprob
from armillary.serve.schedule import Limits, Outcome, Reason, Schedule, State
from armillary.serve.verify import ScheduleError


def make(*, eos=(), executor=None, policy=None, **config):
    config = {"kv_blocks": 64, "block_size": 4} | config
    executor = executor or TableExecutor(config["block_size"])
    clock = getattr(executor, "clock", None)
    return Engine(executor, EngineConfig(**config), clock=clock, eos_ids=eos, policy=policy)


def listened(engine, name, prompt, max_tokens, text=None, **sampling):
    events = []
    made = Request(name, tuple(prompt), SamplingParams(max_tokens=max_tokens, **sampling), text=text, on_event=events.append)
    engine.submit(made)
    return made, events


def counting(clock=None):
    """An executor whose n-th token of any request is n."""
    return TimedExecutor(clock or VirtualClock(), token=lambda request, position: position - len(request.prompt))


class Words:
    """A text stream in which token n reads '<n>', held back by one token, and `stop` ends the text."""

    def __init__(self, stop=None):
        self.stop, self.stopped, self.held, self.pushed = stop, False, "", []

    def push(self, token):
        self.pushed.append(token)
        out, self.held = self.held, f"<{token}>"
        if token == self.stop:
            self.stopped, self.held = True, ""
        return out

    def finish(self):
        out, self.held = self.held, ""
        return out


# -- how a request ends


@pytest.mark.parametrize(
    ("sampling", "eos", "output", "reason"),
    [
        ({}, [], [0, 1, 2, 3, 4], "length"),
        ({}, [2], [0, 1, 2], "stop"),
        ({"ignore_eos": True}, [2], [0, 1, 2, 3, 4], "length"),
        ({"stop_token_ids": (3,)}, [], [0, 1, 2, 3], "stop"),
        ({"ignore_eos": True, "stop_token_ids": (3,)}, [2], [0, 1, 2, 3], "stop"),
        ({}, [4], [0, 1, 2, 3, 4], "stop"),
    ],
)
def test_the_end_of_a_sequence(sampling, eos, output, reason):
    engine = make(executor=counting(), eos=eos)
    made, events = listened(engine, "a", [9, 9], 5, **sampling)
    engine.run_until_idle()
    assert made.output == output
    assert made.finish_reason == reason
    assert [event.finish_reason for event in events] == [None] * (len(output) - 1) + [reason]
    assert [event.token for event in events] == output


def test_text_arrives_when_certain_and_is_complete_at_the_end():
    engine = make(executor=counting(), eos=[3])
    by_length, first = listened(engine, "length", [9], 3, text=Words())
    by_eos, second = listened(engine, "eos", [9], 9, text=Words())
    by_string, third = listened(engine, "string", [9], 9, text=Words(stop=2))
    engine.run_until_idle()
    assert [event.text for event in first] == ["", "<0>", "<1><2>"]
    assert [event.text for event in second] == ["", "<0>", "<1>", "<2>"]  # the end token itself is no text
    assert by_eos.text.pushed == [0, 1, 2]
    assert [event.text for event in third] == ["", "<0>", "<1>"]  # nothing of the stop string
    assert [r.finish_reason for r in (by_length, by_eos, by_string)] == ["length", "stop", "stop"]
    assert by_string.output == [0, 1, 2]


def test_a_text_stream_that_fails_ends_its_request_alone():
    class Broken(Words):
        def push(self, token):
            raise UnicodeError("no such token")

    engine = make(executor=counting())
    broken, events = listened(engine, "broken", [9], 4, text=Broken())
    sound, _ = listened(engine, "sound", [9], 4)
    engine.run_until_idle()
    assert broken.finish_reason == "error"
    assert isinstance(events[-1].error, UnicodeError)
    assert sound.output == [0, 1, 2, 3]


def test_max_tokens_zero_only_computes_the_prompt():
    for policy in policies.names():
        engine = make(policy=policies.get(policy), max_batch_tokens=4)
        made, events = listened(engine, "a", range(10), 0)
        engine.run_until_idle()
        assert (made.output, made.computed, made.finish_reason) == ([], 10, "length")
        assert [(event.token, event.finish_reason) for event in events] == [(None, "length")]


def test_times_are_those_of_the_clock():
    clock = VirtualClock(100)
    engine = make(executor=counting(clock), max_batch_tokens=4)
    made, events = listened(engine, "a", range(8), 3)
    clock.advance(50)
    engine.run_until_idle()
    assert (made.arrival, made.first_scheduled, made.first_token, made.last_token, made.finished) == (100, 150, 152, 154, 154)
    assert [event.at for event in events] == [152, 153, 154]


def test_prompt_scores_are_kept_once_whatever_the_chunks_and_preemptions():
    class Scoring(TableExecutor):
        def run(self, plan):
            outcome = super().run(plan)
            scores = []
            for entry, asked in zip(plan.schedule.entries, plan.requests, strict=True):
                end = min(entry.start + entry.count, len(asked.prompt) - 1)
                scores.append(tuple(TokenLogprob(asked.prompt[p], -p) for p in range(entry.start + 1, end + 1)))
            return Outcome(outcome.sampled, tuple(scores), outcome.start, outcome.end)

    engine = make(executor=Scoring(1), block_size=1, kv_blocks=30, max_batch_tokens=3)
    requests = [request(name, range(10, 20), 15, prompt_logprobs=0) for name in "abc"]
    for made in requests:  # or they would share their memory, and all three would fit
        made.cache_salt = made.id
    replay(engine, engine.clock, requests)
    assert engine.stats.preemptions > 0
    for made in requests:
        assert made.prompt_logprobs == [None] + [TokenLogprob(9 + p + 1, -p) for p in range(1, 10)]


# -- leaving early


@pytest.mark.parametrize("policy", policies.names())
def test_a_cancelled_request_gives_its_blocks_back_wherever_it_is(policy):
    engine = make(policy=policies.get(policy), max_batch_tokens=4, max_running=2)
    running, events = listened(engine, "running", range(2), 20)
    engine.step()
    chunked, _ = listened(engine, "chunked", range(12), 20)
    waiting, _ = listened(engine, "waiting", range(12), 20)
    engine.step()
    assert engine.cancel("waiting")
    assert engine.cancel("chunked")
    assert not engine.cancel("chunked")
    assert not engine.cancel("never was")
    assert engine.snapshot()["blocks"]["used"] == len(running.blocks)
    assert engine.cancel("running")
    assert engine.snapshot()["blocks"]["used"] == 0
    assert {r.finish_reason for r in (running, chunked, waiting)} == {"cancelled"}
    assert events[-1].finish_reason == "cancelled"
    assert not engine.step()


def test_a_request_cancelled_after_its_end_but_before_its_batch_returns_leaves_at_once():
    engine = make(executor=counting(), policy=policies.get("request-level"))
    short, events = listened(engine, "short", [9], 1)
    long, _ = listened(engine, "long", [9], 3)
    engine.step()
    assert short.finish_reason is None
    assert engine.snapshot()["requests"][-1]["phase"] == "returning"
    assert engine.cancel("short")
    assert [event.finish_reason for event in events] == ["cancelled"]
    engine.run_until_idle()
    assert long.finish_reason == "length"


def test_cancelling_the_last_running_request_returns_the_batch():
    engine = make(executor=counting(), policy=policies.get("request-level"))
    short, _ = listened(engine, "short", [9], 1)
    listened(engine, "long", [9], 30)
    engine.step()
    engine.cancel("long")
    assert short.finish_reason == "length"
    assert engine.snapshot()["blocks"]["used"] == 0


@pytest.mark.parametrize("outlives", [False, True])
def test_a_request_cancelled_while_the_executor_works_on_it_leaves_at_once(outlives):
    executor = TableExecutor(4)
    engine = make(executor=executor)
    victim, events = listened(engine, "victim", [1, 2], 9)
    other, _ = listened(engine, "other", [3], 4)
    seen = []

    def interrupt(plan):
        executor.on_run = None
        executor.fail = outlives
        assert engine.cancel("victim")
        assert not engine.cancel("victim")
        seen.append((victim.finish_reason, list(victim.blocks), engine.snapshot()["blocks"]["used"]))
        engine.submit(request("victim", [4], 2))  # the name is free again, and the iteration's result is not the newcomer's

    engine.step()
    executor.on_run = interrupt
    engine.run_until_idle()
    assert seen == [("cancelled", [], 1)]
    assert [event.finish_reason for event in events] == [None, "cancelled"]
    assert len(victim.output) == 1
    assert other.finish_reason == ("error" if outlives else "length")
    assert engine.stats.finished["length"] == (1 if outlives else 2)


def test_a_sequence_grows_into_the_block_after_its_last_when_that_is_free():
    seen = []
    executor = TableExecutor(4)
    executor.on_run = lambda plan: seen.append(dict(zip([r.id for r in plan.requests], plan.block_tables, strict=True)))
    engine = make(executor=executor)
    for name in "abc":
        engine.submit(request(name, range(4), 9))
    engine.step()
    engine.cancel("b")
    engine.cancel("c")
    engine.step()
    assert seen[0] == {"a": (0,), "b": (1,), "c": (2,)}
    assert seen[1] == {"a": (0, 1)}


# -- failures


def test_an_executor_that_fails_ends_its_iteration_and_no_more():
    executor = TableExecutor(4)
    engine = make(executor=executor, max_running=1)
    hit, events = listened(engine, "hit", [1, 2], 4)
    spared, _ = listened(engine, "spared", [3], 4)
    executor.fail = True
    assert engine.step()
    assert hit.finish_reason == "error"
    assert isinstance(events[-1].error, MemoryError)
    engine.run_until_idle()
    assert spared.output == plain_loop([3], 4, eos=())
    assert engine.stats.failed_iterations == 1


@pytest.mark.parametrize(
    "outcome",
    [
        Outcome((), (), 0, 1),
        Outcome(((),), ((),), 0, 1),
        Outcome(((TokenLogprob(1),),), ((),), 1, 0),
        Outcome(((TokenLogprob(1),) * 2,), ((),), 0, 1),
    ],
)
def test_an_outcome_that_does_not_answer_the_plan_is_a_failure(outcome):
    class Wrong:
        def run(self, plan):
            return outcome

    engine = make(executor=Wrong())
    made, events = listened(engine, "a", [1], 4)
    engine.run_until_idle()
    assert made.finish_reason == "error"
    assert "executor" in str(events[-1].error)


def test_an_interrupt_leaves_the_state_as_it_was():
    executor = TableExecutor(4)
    engine = make(executor=executor)
    made, _ = listened(engine, "a", [1, 2], 4)
    engine.step()
    executor.on_run = lambda plan: (_ for _ in ()).throw(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        engine.step()
    executor.on_run = None
    engine.run_until_idle()
    assert made.output == plain_loop([1, 2], 4, eos=())


def test_an_interrupted_listener_is_told_the_rest():
    engine = make()
    heard = []

    def interrupted(event):
        heard.append(event)
        if len(heard) == 1:
            raise KeyboardInterrupt

    engine.submit(Request("a", (1,), SamplingParams(max_tokens=3), on_event=interrupted))
    with pytest.raises(KeyboardInterrupt):
        engine.run_until_idle()
    engine.run_until_idle()
    assert [event.finish_reason for event in heard] == [None, None, "length"]


def test_a_listener_that_raises_harms_nobody(caplog):
    engine = make()

    def shout(event):
        raise RuntimeError("not listening")

    loud = Request("loud", (1,), SamplingParams(max_tokens=3), on_event=shout)
    engine.submit(loud)
    quiet, events = listened(engine, "quiet", [2], 3)
    engine.run_until_idle()
    assert (len(loud.output), len(quiet.output), len(events)) == (3, 3, 3)
    assert sum("listener" in record.message for record in caplog.records) == 1  # said once, not at every token


def test_a_listener_may_submit_and_cancel_but_not_step():
    engine = make(executor=counting())
    refused = []

    def react(event):
        if event.token == 1:
            engine.cancel("first")
            engine.submit(request("second", [9], 2))
            try:
                engine.step()
            except ArmillaryError as error:
                refused.append(error)

    first = Request("first", (9,), SamplingParams(max_tokens=9), on_event=react)
    engine.submit(first)
    engine.run_until_idle()
    assert first.finish_reason == "cancelled"
    assert first.output == [0, 1]
    assert engine.stats.finished["length"] == 1


class Idle:
    name, returns_together, behind = "idle", False, Reason.QUEUE_ORDER

    def step(self, state):
        return Schedule(state.index)


def test_a_defective_policy_is_reported_not_patched():
    engine = make(policy=Idle())
    made, _ = listened(engine, "a", [1], 2)
    with pytest.raises(ScheduleError, match="runs nothing although there is work"):
        engine.step()
    assert made.finish_reason is None


# -- the thread


def test_requests_from_many_threads_are_all_served():
    engine = make(max_running=4, eos=[7])
    engine.start()
    done = {}

    def client(number):
        for turn in range(5):
            ended = threading.Event()
            made = Request(
                f"{number}/{turn}",
                (number, turn),
                SamplingParams(max_tokens=8),
                on_event=lambda e, ended=ended: e.finish_reason and ended.set(),
            )
            engine.submit(made)
            assert ended.wait(60)
            done[made.id] = made

    clients = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in clients:
        thread.start()
    for thread in clients:
        thread.join()
    engine.run_until_idle()
    engine.check()
    engine.stop()
    assert len(done) == 40
    for made in done.values():
        assert made.output == plain_loop(made.prompt, 8)


def test_the_thread_sleeps_while_there_is_nothing_to_do(monkeypatch):
    engine = make()
    rounds = []
    real = engine._step
    monkeypatch.setattr(engine, "_step", lambda: (rounds.append(1), real())[1])
    engine.start()
    engine.submit(request("a", [1], 3))
    engine.run_until_idle()
    time.sleep(0.05)
    engine.stop()
    assert len(rounds) <= 4  # three iterations, and one look after the last


def test_stop_ends_what_is_left_and_start_serves_again():
    gate, entered = threading.Event(), threading.Event()
    executor = TableExecutor(4)
    executor.on_run = lambda plan: (entered.set(), gate.wait(30))
    engine = make(executor=executor, max_running=1)
    engine.start()
    with pytest.raises(ArmillaryError, match="already runs"):
        engine.start()
    with pytest.raises(ArmillaryError, match="runs on its own thread"):
        engine.step()
    running, heard = listened(engine, "running", [1], 50)
    waiting, _ = listened(engine, "waiting", [2], 50)
    assert entered.wait(30)
    assert engine.cancel("running")
    gate.set()
    engine.stop()
    assert {running.finish_reason, waiting.finish_reason} == {"cancelled"}
    assert heard[-1].finish_reason == "cancelled"
    engine.check()
    engine.start()
    again, _ = listened(engine, "again", [3], 4)
    engine.run_until_idle()
    engine.stop()
    assert again.output == plain_loop([3], 4, eos=())


def test_a_defective_policy_does_not_kill_the_thread():
    policy = Idle()
    engine = make(policy=policy)
    engine.start()
    ended = threading.Event()
    failures = []
    engine.submit(Request("a", (1,), SamplingParams(max_tokens=2), on_event=lambda event: (failures.append(event), ended.set())))
    assert ended.wait(30)
    assert isinstance(failures[0].error, ScheduleError)
    engine.policy = policies.get("vllm")
    made, _ = listened(engine, "b", [1], 2)
    engine.run_until_idle()
    engine.stop()
    assert made.finish_reason == "length"


# -- bounds


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "complaint"),
    [
        (0, 4, "the prompt is empty"),
        (4, -1, "max_tokens is -1"),
        (90, 20, "prompt of 90 tokens and max_tokens 20 make 110 tokens; the context is 100"),
        (60, 30, "need 23 KV blocks of 4 tokens; the pool has 20"),
    ],
)
def test_what_can_never_run_is_refused_with_both_numbers(prompt, max_tokens, complaint):
    engine = make(kv_blocks=20, context=100)
    with pytest.raises(InputError, match=complaint):
        engine.submit(request("a", range(prompt), max_tokens))
    assert not engine.step()


def test_the_longest_sequence_that_fits_the_pool_runs():
    for policy in policies.names():
        engine = make(policy=policies.get(policy), kv_blocks=5, max_batch_tokens=3, executor=counting())
        made = request("a", range(12), 8)
        engine.submit(made)
        engine.run_until_idle()
        assert len(made.output) == 8


def test_ids_are_unique_among_the_living_and_requests_are_used_once():
    engine = make()
    made = request("a", [1], 2)
    engine.submit(made)
    with pytest.raises(InputError, match="already being served"):
        engine.submit(request("a", [2], 2))
    engine.run_until_idle()
    engine.submit(request("a", [2], 2))
    with pytest.raises(InputError, match="has already been served"):
        engine.submit(made)
    with pytest.raises(InputError, match="no id"):
        engine.submit(request("", [2], 2))


def test_a_full_queue_refuses_and_recovers():
    engine = make(max_queue=3)
    for number in range(3):
        engine.submit(request(number, [1], 1))
    with pytest.raises(CapacityError, match=r"the queue holds its bound of 3 requests.*retry"):
        engine.submit(request("late", [1], 1))
    engine.run_until_idle()
    engine.submit(request("late", [1], 1))
    engine.run_until_idle()
    assert engine.stats.finished["length"] == 4


class Touched(list):
    """A queue that counts how many of its requests are looked at."""

    looks = 0

    def __iter__(self):
        for item in super().__iter__():
            self.looks += 1
            yield item

    def __getitem__(self, place):
        self.looks += 1
        return super().__getitem__(place)


@pytest.mark.parametrize("policy", policies.names())
def test_a_long_queue_costs_a_step_nothing(policy):
    queue = Touched(request(number, range(10), 5) for number in range(10_000))
    schedule = policies.get(policy).step(State(0, queue, (), 400, Limits(4, 400, 64, 16)))
    assert 0 < len(schedule.entries) <= 16
    assert queue.looks <= len(schedule.entries) + 1


def test_ten_thousand_queued_requests_are_all_served():
    engine = make(executor=counting(), max_batch_tokens=2048, max_running=256, kv_blocks=4096)
    requests = [request(number, [9], 2) for number in range(10_000)]
    for made in requests:
        engine.submit(made)
    assert len(engine.snapshot()["requests"]) < 100  # the page sees the head of the queue
    engine.run_until_idle()
    assert all(made.output == [0, 1] for made in requests)
    assert engine.stats.iterations == -(-10_000 // 256) * 2


# -- what it shows


def test_the_snapshot_is_plain_and_adds_up():
    engine = make(max_batch_tokens=6, max_running=2, executor=counting())
    for number, length in enumerate((2, 9, 3)):
        engine.submit(request(number, range(length), 5))
    engine.step()
    shown = engine.snapshot()
    assert json.loads(json.dumps(shown, default=list)) is not None
    assert [(row["id"], row["phase"], row["computed"], row["held"]) for row in shown["requests"]] == [
        ("0", "decode", 2, None),
        ("1", "prompt", 4, None),
        ("2", "queued", 0, "max running sequences reached"),
    ]
    assert shown["running"] == 2
    assert shown["waiting"] == 1
    assert shown["blocks"] == {"used": 4, "kept": 0, "total": 64, "block_size": 4}
    assert shown["iterations"] == [
        {"index": 0, "entries": (("0", 2), ("1", 4)), "tokens": 6, "start": 0, "end": 1, "preempted": (), "blocks_used": 4}
    ]


def test_the_counters_count_each_token_once_despite_preemption():
    engine = make(block_size=1, kv_blocks=20, max_batch_tokens=8)
    requests = [request(name, range(8), 10, ignore_eos=True) for name in "abc"]
    for made in requests:
        made.cache_salt = made.id
    replay(engine, engine.clock, requests)
    stats = engine.stats
    assert stats.preemptions == sum(made.preemptions for made in requests) > 0
    assert (stats.prompt_tokens, stats.generated_tokens) == (24, 30)
    assert stats.finished == {"stop": 0, "length": 3, "cancelled": 0, "error": 0}
    computed = sum(tokens for row in engine.snapshot()["iterations"] for _, tokens in row["entries"])
    assert computed == 24 + 30 - 3 + stats.recomputed_tokens - stats.reused_tokens  # the last token of each is never computed


def test_a_request_explains_itself():
    engine = make(block_size=1, kv_blocks=20, max_batch_tokens=8)
    requests = [request(name, range(8), 10, ignore_eos=True) for name in "abc"]
    for made in requests:
        made.cache_salt = made.id
    replay(engine, engine.clock, requests)
    story = engine.explain("b")
    assert "arrived with a prompt of 8 tokens, 1 requests ahead" in story[0]
    assert any("preempted: an earlier sequence needed its KV blocks; gave back" in line for line in story)
    assert "ended: length, 10 tokens generated" in story[-2]
    assert story[-1].startswith("in short: waited ")
    assert engine.explain("unknown") is None
    for number in range(300):
        engine.submit(request(number, [1], 1))
    engine.run_until_idle()
    assert engine.explain("b") is None  # forgotten in time
    assert engine.explain("299") is not None


def test_the_trace_tells_the_same_story_as_the_requests():
    trace = Trace()
    executor = TableExecutor(1)
    engine = Engine(executor, EngineConfig(block_size=1, kv_blocks=20, max_batch_tokens=8), clock=executor.clock, trace=trace)
    requests = [request(name, range(8), 10, ignore_eos=True) for name in "abc"]
    replay(engine, executor.clock, requests)
    lanes = {lane: [span for span in trace.spans() if span.lane == lane] for lane in ("engine", "request/a", "request/b", "request/c")}
    assert sum(map(len, lanes.values())) == len(trace)
    assert len(lanes["engine"]) == engine.stats.iterations
    for made in requests:
        spans = lanes[f"request/{made.id}"]
        assert [span.end for span in spans] == sorted(span.end for span in spans)
        assert all(before.end <= after.start for before, after in itertools.pairwise(spans))
        assert sum(span.sizes["tokens"] for span in spans if span.kind == "decode") <= 9
        lost = [span for span in spans if span.kind == "preempted"]
        assert len(lost) == made.preemptions
        assert all(span.reason for span in lost)
        assert (spans[-1].end, made.finish_reason) == (made.finished, "length")
    per_iteration = [span.sizes["tokens"] for span in lanes["engine"]]
    assert sum(per_iteration) == sum(span.sizes.get("tokens", 0) for made in requests for span in lanes[f"request/{made.id}"])
    used = [sample.values["used"] for sample in trace.counters()]
    assert used == [span.sizes["blocks_used"] for span in lanes["engine"]]
    assert max(used) <= 20


def test_a_request_that_arrives_while_the_engine_stops_is_refused():
    engine = make(executor=counting())
    engine.start()
    engine._stopping = True  # what stop() says first, before it waits for the thread
    with pytest.raises(CapacityError, match="stopping"):
        engine.submit(request("late", (1, 2), 4))
    engine.stop()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", float("nan")),
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("top_p", float("nan")),
        ("top_p", 1.1),
        ("min_p", -1.0),
        ("top_k", -2),
        ("repetition_penalty", 0.0),
        ("frequency_penalty", float("inf")),
    ],
)
def test_a_sampling_number_out_of_range_is_named(name, value):
    engine = make(executor=counting())
    with pytest.raises(InputError, match=name):
        engine.submit(request("bad", (1, 2), 4, **{name: value}))
    engine.check()
