"""Stories: every ns that a request waited has a reason, and the words say where the time went."""

import random
import re

import pytest
from laws import TableExecutor, request
from timed import replay

from armillary.core.trace import Trace
from armillary.serve import policies
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine


def make(*, trace=None, **config):
    executor = TableExecutor(config["block_size"])
    return Engine(executor, EngineConfig(**config), clock=executor.clock, trace=trace)


def alone(name, prompt, count):
    """A request that shares nothing with others."""
    made = request(name, range(prompt), count, ignore_eos=True)
    made.cache_salt = made.id
    return made


def test_a_chunked_prompt_and_who_waits_behind_it():
    engine = make(block_size=4, kv_blocks=100, max_batch_tokens=8)
    replay(engine, engine.clock, [alone("long", 30, 5), alone("short", 5, 3)])
    long, short = engine.explain("long"), engine.explain("short")
    assert [line.partition(": ")[2] for line in long[1:5]] == [
        "admitted: 8 of 30 tokens (chunk), 8 KV blocks",
        "chunk: tokens 8 to 16",
        "chunk: tokens 16 to 24",
        "prompt: tokens 24 to 30",
    ]
    assert long[-1] == (
        "in short: waited 0 ns in the queue; 4 ns from there to the first token in 4 pieces, for the token budget ended in it; 4 ns for 4 more"
    )
    assert "waited 3 ns in the queue (token budget spent)" in short[-1]


def test_a_preemption_says_why_for_how_long_and_what_was_left():
    engine = make(block_size=1, kv_blocks=20, max_batch_tokens=8)
    replay(engine, engine.clock, [alone(name, 8, 10) for name in "abc"])
    story = engine.explain("b")
    assert any("preempted: an earlier sequence needed its KV blocks; gave back 9 KV blocks" in line for line in story)
    assert any("of the 9 that preemption took 3 were still kept" in line for line in story)
    assert "preempted once, back after 6 ns (5 ns no free KV blocks, 1 ns an earlier sequence needed its KV blocks)" in story[-1]


def test_reuse_and_an_end_in_the_queue_are_told():
    engine = make(block_size=4, kv_blocks=100, max_batch_tokens=64, max_running=1)
    for made in (request("first", range(12), 4, ignore_eos=True), request("again", range(12), 4, ignore_eos=True), alone("never", 3, 1)):
        engine.submit(made)
    engine.step()
    engine.cancel("never")
    engine.run_until_idle()
    assert "8 of 12 tokens of it reused" in engine.explain("again")[-1]
    assert "max running sequences reached" in engine.explain("again")[-1]
    assert engine.explain("never")[-1].endswith("and never ran")


@pytest.mark.parametrize("policy", policies.names())
def test_every_wait_has_a_reason(policy):
    """The reasons of a story add up to the waits that the trace has, under any policy."""
    draw = random.Random(5)
    trace = Trace()
    engine = make(trace=trace, policy=policy, block_size=2, kv_blocks=40, max_batch_tokens=24, max_running=6)
    requests = [alone(str(number), draw.randrange(1, 20), draw.randrange(1, 20)) for number in range(60)]
    for made in requests:
        made.arrival = draw.randrange(200)
    requests.sort(key=lambda made: made.arrival)
    replay(engine, engine.clock, requests)
    for made in requests:
        story = engine._history._ended[made.id]
        spans = [span for span in trace.spans() if span.lane == f"request/{made.id}"]
        assert story.queued.total() == made.first_scheduled - made.arrival
        assert story.queued.total() == sum(span.duration for span in spans if span.kind == "queued")
        assert story.returning.total() == sum(span.duration for span in spans if span.kind == "preempted")
        lived = sum(span.duration for span in spans)
        assert lived + story.left_out.total() == made.finished - made.arrival or engine.policy.returns_together
        pieces = [span for span in spans if span.reason == "chunk"]
        assert story.chunks == len(pieces)
        assert bool(pieces) == bool(re.search(r"in \d+ pieces", story.words[-1]))
        assert bool(made.preemptions) == ("preempted" in story.words[-1])


def test_a_long_story_is_cut_in_its_middle():
    engine = make(block_size=1, kv_blocks=2000, max_batch_tokens=1, max_running=1)
    replay(engine, engine.clock, [alone("slow", 500, 1)])
    story = engine.explain("slow")
    assert len(story) == 66  # the 64 that are kept, what is missing, and the whole in short
    assert "arrived" in story[0]
    assert any(re.fullmatch(r"\(\d+ events left out\)", line) for line in story)
    assert "in 500 pieces" in story[-1]
