"""Two replica processes on a tiny random model: stopped, killed and restarted, and nobody who asks can tell."""

import os
import re
import signal
import threading
import time

import pytest
from fastapi.testclient import TestClient
from fleet_models import ThreadLauncher, tiny_engine
from models import loaded, tiny

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.build import share
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.fleet import Blueprint, Fleet
from armillary.serve.grammar.compiler import GrammarCompiler
from armillary.serve.grammar.grammar import regex
from armillary.serve.http.app import create_app
from armillary.serve.operations.keys import ApiKey, KeyRing
from armillary.serve.request import Request, SamplingParams
from armillary.serve.service import Service
from armillary.serve.text import TextStream

ENGINE = {"kv_blocks": 200, "block_size": 8, "max_batch_tokens": 64, "max_running": 8, "threads": 1, "context": 256}
TOKENIZER = loaded(tiny()).tokenizer


def make(blueprint=None, engine=None, launcher=None, **fleet):
    config = EngineConfig(**(ENGINE | (engine or {})))
    blueprint = blueprint or Blueprint("fleet_models:tiny_engine", {"engine": ENGINE | (engine or {})})
    return Fleet(blueprint, config, FleetConfig(**({"replicas": 2} | fleet)), eos_ids=TOKENIZER.stop_ids, launcher=launcher)


@pytest.fixture(scope="module")
def fleet():
    made = make(silence=0.5, router="round-robin")
    made.start()
    yield made
    made.stop()
    assert [process.started for process in made._processes] == [None, None]


@pytest.fixture(scope="module")
def alone():
    return tiny_engine(ENGINE).engine


class Listener:
    """Keeps a request's events; `at` tokens it calls `then`."""

    def __init__(self, at=None, then=None):
        self.events, self.ended, self.at, self.then = [], threading.Event(), at, then

    def __call__(self, event):
        self.events.append(event)
        if self.at is not None and len(self.events) == self.at:
            self.then()
        if event.finish_reason is not None:
            self.ended.set()

    @property
    def text(self):
        return "".join(event.text for event in self.events)


COMPILER = GrammarCompiler(TOKENIZER, 97)


def asked(name, prompt, listener, grammar=None, **sampling):
    sampling = {"max_tokens": 40, "temperature": 0.0, "ignore_eos": True} | sampling
    text = TextStream(TOKENIZER, tuple(sampling.get("stop", ())))
    constraint = None if grammar is None else COMPILER.compile(grammar).matcher()
    return Request(str(name), tuple(prompt), SamplingParams(**sampling), text=text, on_event=listener, constraint=constraint)


def run(engine, listeners, requests):
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    return [
        (request.output, listener.text, request.finish_reason, request.logprobs)
        for listener, request in zip(listeners, requests, strict=True)
    ]


KINDS = [
    {},
    {"temperature": 1.0, "seed": 7},
    {"temperature": 1.0},  # from the engine's seed and the request's id
    {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2, "seed": 1},
    {"ignore_eos": False, "temperature": 2.0, "seed": 3},
    {"stop": ("e", "5"), "temperature": 1.5, "seed": 4},
    {"logit_bias": ((5, 3.0), (6, -100.0))},
    {"logprobs": 3, "temperature": 1.0, "seed": 9},
    {"max_tokens": 1},
    {"stop_token_ids": tuple(range(0, 97, 4)), "temperature": 1.0, "seed": 11},
    {"grammar": regex("[A-M]{3,30}(YES|NO)"), "ignore_eos": False, "temperature": 1.0, "seed": 12},
]


def those(name, at=None, then=None, **more):
    listeners = [Listener(at, then) for _ in KINDS]
    prompts = [[(3 * i + 7 * j) % 90 for j in range(5 + 4 * i)] for i in range(len(KINDS))]
    return listeners, [asked(f"{name}{i}", prompts[i], listeners[i], **KINDS[i] | more) for i in range(len(KINDS))]


def same(found, expected):
    for (output, text, reason, logprobs), (their_output, their_text, their_reason, their_logprobs) in zip(found, expected, strict=True):
        assert (output, text, reason) == (their_output, their_text, their_reason)
        assert [one.token for one in logprobs] == [one.token for one in their_logprobs]
        assert [one.logprob for one in logprobs] == pytest.approx([one.logprob for one in their_logprobs], abs=1e-4)


def wait(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_answers_are_the_single_engines(fleet, alone):
    same(run(fleet, *those("a")), run(alone, *those("a")))
    scored = [Listener(), Listener()]
    requests = [asked("scored", range(30), listener, prompt_logprobs=2, max_tokens=0) for listener in scored]
    run(fleet, scored[:1], requests[:1])
    run(alone, scored[1:], requests[1:])
    assert [score and score.token for score in requests[0].prompt_logprobs] == [None, *range(1, 30)]
    assert [s.logprob for s in requests[0].prompt_logprobs[1:]] == pytest.approx(
        [s.logprob for s in requests[1].prompt_logprobs[1:]], abs=1e-4
    )
    state = fleet.snapshot()
    assert alone.snapshot().keys() == state.keys()
    assert (state["running"], state["waiting"], state["requests"]) == (0, 0, [])
    assert sum(replica["index"] for replica in state["features"]["fleet"]["replicas"]) == 1
    assert any("'s turn" in line for line in fleet.explain("a1"))
    wait(lambda: any(line.startswith("replica ") and "admitted" in line for line in fleet.explain("a1")))
    assert fleet.explain("nobody") is None


def test_what_cannot_be_served_is_refused_at_the_door(fleet):
    with pytest.raises(InputError, match="context is 256"):
        fleet.submit(asked("long", range(90), None, max_tokens=200))
    listener = Listener()
    fleet.submit(asked("cancelled", [1, 2], listener, max_tokens=200))
    assert fleet.cancel("cancelled")
    fleet.run_until_idle()
    assert listener.events[-1].finish_reason == "cancelled"
    assert not fleet.cancel("cancelled")


def test_choices_of_an_answer_share_its_prompt_on_one_replica(fleet, alone):
    def choices(name):
        listeners = [Listener() for _ in range(3)]
        requests = [asked(f"{name}/{i}", range(3, 40), listeners[i], max_tokens=150, temperature=1.0, seed=i) for i in range(3)]
        for request in requests[1:]:
            request.parent = requests[0]
        return listeners, requests

    before = fleet.stats.forked_tokens
    listeners, requests = choices("c")
    with fleet._changed:  # nothing of the first is heard before all are sent
        for request in requests:
            fleet.submit(request)
    fleet.run_until_idle()
    found = [
        (request.output, listener.text, request.finish_reason, request.logprobs)
        for listener, request in zip(listeners, requests, strict=True)
    ]
    same(found, run(alone, *choices("c")))
    wait(lambda: fleet.stats.forked_tokens - before >= 36)  # twice that, unless a busy machine took a replica for silent


def at_work(fleet):
    """The process that has most to do."""
    with fleet._lock:
        return max(fleet._processes, key=lambda process: len(process.member.attempts))


def test_a_stopped_replicas_requests_go_on_elsewhere_and_it_comes_back(fleet, alone):
    long = {"max_tokens": 180}
    expected = run(alone, *those("s", **long))
    stopped = []

    def stop():
        if not stopped:
            stopped.append(at_work(fleet))
            os.kill(stopped[0].pid, signal.SIGSTOP)

    moved = fleet.dispatcher.stats.moved
    try:
        same(run(fleet, *those("s", at=10, then=stop, **long)), expected)
        assert fleet.dispatcher.stats.moved > moved
        same(run(fleet, *those("t", **{"max_tokens": 5})), run(alone, *those("t", **{"max_tokens": 5})))
        wait(lambda: stopped[0].member.health == "silent")
    finally:
        os.kill(stopped[0].pid, signal.SIGCONT)
    wait(lambda: stopped[0].member.health in ("slow", "open"))
    wait(lambda: not fleet.snapshot()["blocks"]["used"])


def test_a_killed_replicas_requests_go_on_elsewhere_and_it_is_started_again(fleet, alone):
    long = {"max_tokens": 180}
    expected = run(alone, *those("k", **long))
    killed = []

    def kill():
        if not killed:
            process = at_work(fleet)
            killed.append((process, process.pid))
            os.kill(process.pid, signal.SIGKILL)

    generated = fleet.stats.generated_tokens
    same(run(fleet, *those("k", at=10, then=kill, **long)), expected)
    assert fleet.stats.generated_tokens - generated == sum(len(output) for output, *_ in expected)
    assert fleet.dispatcher.stats.deaths == 1
    told = [line for i in range(len(KINDS)) for line in fleet.explain(f"k{i}") or ()]
    assert any("died (signal 9): to be continued elsewhere after" in line for line in told)
    process, pid = killed[0]
    wait(lambda: process.member.health == "open")
    assert process.pid != pid
    same(run(fleet, *those("u")), run(alone, *those("u")))


def test_threads_and_memory_are_divided_before_anything_is_loaded():
    model, given = tiny().config, EngineConfig(kv_blocks=101, block_size=8, threads=5, offload="auto", offload_memory=1000)
    each = share(given, model, FleetConfig(replicas=4), None, cores=2)
    assert (each.kv_blocks, each.threads, each.offload_memory, each.max_running) == (25, 1, 250, given.max_running)
    two = share(EngineConfig(kv_blocks=101), model, FleetConfig(prefill_workers=1, decode_workers=1), None, cores=6)
    assert (two.kv_blocks, two.threads) == (50, 3)
    on_ray = share(given, model, FleetConfig(replicas=4, ray=True), None, cores=2)
    assert (on_ray.kv_blocks, on_ray.threads, on_ray.offload_memory) == (101, 5, 1000)
    with pytest.raises(InputError, match="3 KV blocks are not one for each of 4 replicas"):
        share(EngineConfig(kv_blocks=3), model, FleetConfig(replicas=4), None, cores=2)


def test_a_model_that_cannot_be_built_is_said_at_the_start():
    broken = make(Blueprint("armillary.serve.policies:get", {"name": "fastest"}))
    with pytest.raises(NotFoundError, match="no scheduler policy is called 'fastest'"):
        broken.start()
    assert not broken.alive


def test_the_api_of_a_fleet_is_that_of_an_engine(fleet):
    one = tiny_engine(ENGINE).engine
    one.start()
    asks = [
        {"prompt": "abc", "max_tokens": 20, "seed": 3, "n": 3, "logprobs": 2, "stop": ["e", "5"]},
        {"prompt": ["hello", "world"], "max_tokens": 9, "temperature": 0, "echo": True, "ignore_eos": True},
        {"prompt": "x" * 300, "max_tokens": 9},
        {"prompt": "stream", "max_tokens": 12, "temperature": 0, "stream": True, "ignore_eos": True},
    ]
    said = []
    for engine in (fleet, one):
        client = TestClient(create_app(Service(engine, loaded(tiny())), allowed_hosts=("*",)))
        answers = [client.post("/v1/completions", json=ask) for ask in asks]
        names = [answer.headers.get("x-request-id", "") for answer in answers]
        texts = [re.sub(r'"created":\d+|-\d\.\d+', "", answer.text) for answer in answers]
        said.append([(answer.status_code, text.replace(name, "ID")) for answer, name, text in zip(answers, names, texts, strict=True)])
        assert client.get("/health").status_code == 200
        story = client.get(f"/requests/{names[0]}").text
        metrics = client.get("/metrics").text
        assert ("armillary_replica_up" in metrics) == ("sent to replica" in story) == (engine is fleet)
        assert 'armillary_requests_finished_total{finished_reason="length"' in metrics
    one.stop()
    assert [status for status, _ in said[0]] == [200, 200, 400, 200]
    assert said[0] == said[1]


def test_a_keys_limits_are_those_of_the_whole_server():
    """They are kept where requests come in, before any replica: tokens are charged once, also where two replicas were asked."""
    made = make(Blueprint("fleet_models:scripted_engine", {"engine": ENGINE}), launcher=ThreadLauncher(), tail="tied")
    made.start()
    ring = KeyRing([ApiKey.of("few", "f", requests_per_minute=3), ApiKey.of("short", "s", tokens_per_minute=60)])
    app = create_app(Service(made, loaded(tiny())), allowed_hosts=("*",), api_key=ring)
    ask = {"prompt": list(range(10)), "max_tokens": 200, "n": 2, "ignore_eos": True}

    def post(key):
        return client.post("/v1/completions", json=ask, headers={"authorization": f"Bearer {key}"})

    try:
        client = TestClient(app)
        assert [post("f").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert made.dispatcher.stats.tied > 0  # both replicas were asked
        first = post("s")
        assert first.status_code == 200
        assert "x-ratelimit-remaining-tokens" in first.headers
        second = post("s")
        assert second.status_code == 429
        owed = int(re.findall(r"(\d+) are owed for answers", second.json()["error"]["message"])[0])
        assert 0 < owed <= 2 * (10 + 200) - 60  # and what the bucket has got since
    finally:
        made.stop()
