"""A real run's schedules come out of virtual time again when its durations are fed back; two traces are compared request by request."""

import json
import random
import time

import pytest

from armillary.cli.main import run
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.comparison import compare, first_difference, schedules
from armillary.serve.simulation.replayed import Witness, run_again
from tests.serve.models import VOCABULARY, loaded, tiny


def real_run(policy, seed, **options):
    """Requests that come while others are served, on the engine's own thread."""
    config = {"kv_blocks": 40, "block_size": 8, "max_batch_tokens": 24, "max_running": 5, "threads": 1}
    trace = Trace("real")
    engine = build_engine(loaded(tiny()), EngineConfig(policy=policy, **config | options), trace=trace)
    witness = engine.policy = Witness(engine.policy)
    generator, requests = random.Random(seed), []
    shared = tuple(generator.randrange(VOCABULARY - 1) for _ in range(24))
    engine.start()
    try:
        for number in range(14):
            prompt = shared[: generator.choice((0, 16, 24))] + tuple(generator.randrange(90) for _ in range(generator.randint(1, 60)))
            requests.append(Request(f"r{number}", prompt, SamplingParams(generator.randint(1, 30), temperature=0.0, ignore_eos=True)))
            engine.submit(requests[-1])
            if number in (5, 9):
                engine.run_until_idle()
            time.sleep(generator.choice((0, 0, 0.001, 0.004)))
        engine.run_until_idle()
    finally:
        engine.stop()
    return engine, witness, requests, trace


@pytest.mark.parametrize(
    ("policy", "options"),
    [("sarathi", {}), ("vllm", {"kv_blocks": 24}), ("orca", {"prefix_cache": "off"}), ("request-level", {}), ("sarathi", {"order": "sjf"})],
)
def test_a_real_runs_durations_give_its_schedules(policy, options):
    engine, witness, requests, real = real_run(policy, len(policy), **options)
    ends = [span.end for span in real.spans() if span.lane == "engine"]
    virtual = Trace("virtual")
    run_again(engine.config, requests, witness.seen, ends, virtual)
    assert schedules(virtual) == schedules(real)
    assert [span.end for span in virtual.spans() if span.lane == "engine"] == ends
    found = compare(real, virtual)
    assert found.difference is None
    assert found.tpot.p99 == 0
    assert len(found.requests) == len(requests)
    for name, (one, _) in found.requests.items():
        request = next(request for request in requests if request.id == name)
        if request.preemptions < 2:  # a trace does not say whether what is computed again had come to its token
            assert (one.first_token, one.last_token, one.tokens) == (request.first_token, request.last_token, len(request.output))
        assert one.arrival == request.arrival


def test_other_lengths_are_other_schedules():
    engine, witness, requests, real = real_run("sarathi", 1)
    ends = [span.end for span in real.spans() if span.lane == "engine"]
    longest = max(requests, key=lambda request: request.finished)
    longest.output.append(0)
    with pytest.raises(InputError, match="the schedules differ"):
        run_again(engine.config, requests, witness.seen, ends, Trace())


def made(*requests, step=100, name=""):
    """A trace of requests (arrival, first iteration, answer) of one-token prompts, all in one engine."""
    trace, last = Trace(name), max(first + answer for _, first, answer in requests)
    for number, (arrival, first, _) in enumerate(requests):
        trace.add(f"request/{number}", "queued", arrival, first * step)
    for iteration in range(last):
        there = [number for number, (_, first, answer) in enumerate(requests) if first <= iteration < first + answer]
        trace.add("engine", "step", iteration * step, (iteration + 1) * step)
        for number in there:
            kind = "prompt" if iteration == requests[number][1] else "decode"
            trace.add(f"request/{number}", kind, iteration * step, (iteration + 1) * step, kind, {"tokens": 1})
    return trace


def test_errors_are_of_what_was_measured():
    found = compare(made((0, 1, 5), (50, 2, 1)), made((0, 1, 5), (50, 2, 1), step=110))
    (one, other) = found.requests["0"]
    assert (one.ttft, one.tpot, other.ttft, other.tpot) == (200, 100, 220, 110)
    assert found.requests["1"][0].tpot is None
    assert found.tpot.median == found.tpot.bias == pytest.approx(0.1)
    assert found.tpot.requests == 1
    assert found.ttft.median == pytest.approx((0.1 + 30 / 250) / 2)
    assert found.makespans == (600, 660)
    assert found.makespan_error == pytest.approx(0.1)
    assert found.difference is None


def test_where_schedules_part():
    found = compare(made((0, 1, 5), (0, 3, 2)), made((0, 1, 5), (0, 4, 2)))
    assert found.difference.iteration == 3
    assert found.difference.real == (("0", "decode", 1), ("1", "prompt", 1))
    assert found.difference.virtual == (("0", "decode", 1),)
    assert first_difference([()], [(), (("1", "decode", 1),)]).iteration == 1


def test_traces_that_say_too_little_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="no requests"):
        compare(Trace(), made((0, 1, 5)))
    lost = Trace(capacity=3)
    lost.extend(made((0, 1, 5)).spans())
    with pytest.raises(InputError, match=r"the second trace lost \d+ spans"):
        compare(made((0, 1, 5)), lost)
    for name, trace in (("a", made((0, 1, 5))), ("b", made((0, 1, 4)))):
        trace.save(tmp_path / name)
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--each"]) == 0
    assert "the same up to iteration 5" in capsys.readouterr().out
    assert run(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["difference"]["iteration"] == 5
