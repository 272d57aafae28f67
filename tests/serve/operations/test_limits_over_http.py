"""Limits, logs, leaving and looking, over real HTTP."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from http_world import GREETING, World

from armillary.core.trace import Trace
from armillary.serve.http.access_log import AccessLog
from armillary.serve.http.drain import Drain
from armillary.serve.http.operations import Operations
from armillary.serve.http.server import Server
from armillary.serve.operations.keys import ApiKey, KeyRing

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


def logged(world: World, count: int) -> list[dict]:
    """The log's lines when there are `count`: an exchange is over a moment after its client has the last byte."""
    deadline = time.monotonic() + 20
    while world.log.getvalue().count("\n") < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return [json.loads(line) for line in world.log.getvalue().splitlines()]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def limited(tmp_path_factory):
    ring = KeyRing(
        [ApiKey.of("few", "f", requests_per_minute=2), ApiKey.of("short", "s", tokens_per_minute=30), ApiKey.of("free", "free-key")]
    )
    log = io.StringIO()
    drain = Drain()
    world = World(tmp_path_factory.mktemp("limited"), api_key=ring, operations=Operations(access_log=AccessLog(log), drain=drain))
    world.log, world.drain = log, drain
    yield world
    world.close()


def test_the_log_has_numbers_and_names_and_neither_keys_nor_texts(limited):
    secret = "a very private matter"
    answer = limited.http.post(
        TEXT, json={"prompt": secret, "max_tokens": 7, "n": 2, "ignore_eos": True}, headers=bearer("free-key")
    ).json()
    logged(limited, 1)  # two answers may be over in another order than they were asked for
    limited.http.post(TEXT, json={"prompt": secret}, headers=bearer("wrong-key"))
    logged(limited, 2)
    limited.http.get("/health", headers={"host": "evil.example"})
    logged(limited, 3)
    limited.http.get("/nowhere?token=free-key", headers=bearer("free-key"))
    lines = logged(limited, 4)
    assert [(line["method"], line["path"], line["status"], line["key"]) for line in lines] == [
        ("POST", TEXT, 200, "free"),
        ("POST", TEXT, 401, None),
        ("GET", "/health", 403, None),
        ("GET", "/nowhere", 404, "free"),
    ]
    first = lines[0]
    assert first["request_id"] == answer["id"]
    assert (first["choices"], first["prompt_tokens"], first["completion_tokens"]) == (2, 2 * len(secret), 14)
    assert first["finish_reasons"] == ["length"]
    assert first["queue_ms"] + first["prefill_ms"] + first["decode_ms"] <= first["duration_ms"]
    assert not first["client_left"]
    assert all(line["duration_ms"] >= line["first_byte_ms"] >= 0 for line in lines)
    for word in ("private", "free-key", "wrong-key", "evil"):
        assert word not in limited.log.getvalue()


def test_requests_a_minute(limited):
    answers = [limited.http.post("/tokenize", json={"prompt": "a"}, headers=bearer("f")) for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 429, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["1", "0", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"2"}
    assert "x-ratelimit-limit-tokens" not in answers[0].headers
    refused = answers[-1].json()["error"]
    assert refused["code"] == "rate_limit_exceeded"
    assert "key 'few' may use 2 requests a minute, 0 are left" in refused["message"]
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 30  # the next is there in half a minute
    assert limited.http.get("/v1/models", headers=bearer("f")).status_code == 200  # looking is free
    assert limited.http.post("/tokenize", json={"prompt": "a"}, headers=bearer("s")).status_code == 200  # and others have their own


def test_tokens_a_minute_count_prompts_and_answers(limited):
    first = limited.http.post(TEXT, json={"prompt": "0123456789", "max_tokens": 25, "ignore_eos": True}, headers=bearer("s"))
    assert first.status_code == 200  # 10 of 30 for the prompt; the answer's 25 leave a debt of 5
    again = limited.http.post(TEXT, json={"prompt": "x", "max_tokens": 1}, headers=bearer("s"))
    assert again.status_code == 429
    message = again.json()["error"]["message"]
    assert "30 tokens a minute" in message
    assert "are owed for answers" in message
    assert again.headers["x-ratelimit-remaining-tokens"] == "0"
    assert 2 <= int(again.headers["retry-after"]) <= 13  # 6 tokens at one in two seconds
    assert limited.http.post(TEXT, json={"prompt": "0" * 50, "max_tokens": 25}, headers=bearer("free-key")).status_code == 200


def test_a_client_that_leaves_is_logged_as_such(limited):
    limited.typist.reply, limited.typist.delay = lambda request: "y" * 10_000, 0.01
    with limited.http.stream("POST", CHAT, json={**HELLO, "stream": True}, headers=bearer("free-key")) as response:
        next(response.iter_lines())
    limited.wait_idle()
    limited.typist.reply, limited.typist.delay = lambda request: GREETING, 0.0
    deadline = time.monotonic() + 20
    while not (left := [line for line in logged(limited, 1) if line.get("client_left")]):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    (line,) = left
    assert line["finish_reasons"] == ["cancelled"]


def test_answers_are_counted_by_their_status(limited):
    def count(status: int) -> float:
        text = limited.http.get("/metrics", headers=bearer("free-key")).text
        found = re.findall(rf'^armillary_http_answers_total{{.*status="{status}"}} (\S+)$', text, re.MULTILINE)
        return float(found[0]) if found else 0.0

    before = count(404), count(401)
    limited.http.get("/nowhere", headers=bearer("free-key"))
    limited.http.get("/nowhere")
    assert (count(404) - before[0], count(401) - before[1]) == (1, 1)


def test_every_answer_has_a_request_id(limited):
    ids = [limited.http.get(path, headers=bearer("free-key")).headers["x-request-id"] for path in ("/health", "/v1/models", "/nowhere")]
    assert len(set(ids)) == 3


def test_a_wait_that_would_be_too_long_is_refused_with_its_numbers(tmp_path):
    world = World(tmp_path, config={"max_running": 1}, operations=Operations(shed_after=0.05))
    world.typist.delay = 0.02
    for _ in range(3):
        assert world.http.post(CHAT, json={**HELLO, "max_tokens": 5}).status_code == 200
    with ThreadPoolExecutor() as threads, world.typist.hold():
        running = threads.submit(world.http.post, CHAT, json=HELLO)
        world.wait_for(lambda state: state["running"] == 1)
        waiting = threads.submit(world.http.post, CHAT, json=HELLO)
        world.wait_for(lambda state: state["waiting"] == 1)
        refused = world.http.post(CHAT, json=HELLO)
        world.typist.delay = 0.0
        world.typist._go.set()
        assert running.result().status_code == waiting.result().status_code == 200
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "overloaded"
    assert "the bound is 0.05 s" in refused.json()["error"]["message"]
    assert int(refused.headers["retry-after"]) >= 1
    world.close()


def test_draining_finishes_what_runs_and_refuses_what_comes(tmp_path):
    drain = Drain()
    world = World(tmp_path, operations=Operations(drain=drain))
    with ThreadPoolExecutor() as threads:
        with world.typist.hold():
            running = threads.submit(world.http.post, CHAT, json=HELLO)
            world.wait_for(lambda state: state["running"] == 1)
            assert drain.in_flight == 1
            drain.draining = True
            health, late = world.http.get("/health"), world.http.post(CHAT, json=HELLO)
            assert world.http.get("/requests").status_code == 200  # looking is still possible
        assert running.result().json()["choices"][0]["message"]["content"] == GREETING
    for answer in (health, late):
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "draining"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.headers["connection"] == "close"
    assert drain.in_flight == 0
    world.close()


def test_a_response_in_the_background_is_waited_for_too(limited):
    drain = limited.drain
    with limited.typist.hold():
        body = {"input": "Hi", "background": True, "store": True}
        answer = limited.http.post("/v1/responses", json=body, headers=bearer("free-key")).json()
        assert answer["status"] in ("queued", "in_progress")
        limited.wait_for(lambda state: state["running"] == 1 and not drain.exchanges)
        assert drain.in_flight == 1
    limited.wait_for(lambda state: not drain.in_flight)


@pytest.mark.parametrize("patience", ["until it is done", "until the bound"])
def test_sigterm_drains_within_its_bound(tmp_path, patience):
    """The server's own signal handler, called as a signal would; `run` on a thread so that the test can be the client."""
    drain = Drain()
    world = World(tmp_path, operations=Operations(drain=drain))
    world.typist.delay = 0.01
    if patience == "until the bound":
        world.typist.reply = lambda request: "z" * 10_000
    told = []
    seconds = 60.0 if patience == "until it is done" else 0.3
    app = world.server._server.config.app
    server = Server(app, port=0, grace_seconds=60, end_answers=world.engine.stop, drain=drain, drain_seconds=seconds, on_drain=told.append)
    server.start()
    with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor() as threads:
        running = threads.submit(http.post, CHAT, json={**HELLO, "max_tokens": 450})
        world.wait_for(lambda state: state["running"] == 1)
        server._server.handle_exit(signal.SIGTERM, None)
        assert httpx.get(server.url + "/health").status_code == 503
        answer = running.result()
        server._thread.join(timeout=60)
        assert not server._thread.is_alive()
    assert told == [1]
    if patience == "until it is done":
        assert answer.json()["choices"][0]["message"]["content"] == GREETING
    else:
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "cancelled"
    server.stop()
    world.close()


def test_a_head_that_trickles_in_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("armillary.serve.http.connections.HEAD_TIMEOUT_SECONDS", 0.3)
    world = World(tmp_path)

    def closed(first: bytes) -> bool:
        """Whether the server closes a connection that sends `first` and then a byte now and then."""
        with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
            connection.settimeout(0.05)
            try:
                connection.sendall(first)
                for _ in range(400):
                    try:
                        if connection.recv(4096) == b"":
                            return True
                    except TimeoutError:
                        pass
                    connection.sendall(b"a")
            except OSError:
                return True
        return False

    assert closed(b"")
    assert closed(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    assert closed(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /he")  # the second of a kept connection too
    # An answer may take longer than a head: the timer is the head's alone.
    with world.typist.hold(), ThreadPoolExecutor() as threads:
        slow = threads.submit(world.http.post, CHAT, json=HELLO)
        threading.Event().wait(0.6)
        world.typist._go.set()
        assert slow.result().status_code == 200
    world.close()


def test_a_body_that_trickles_in_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("armillary.serve.http.body.READ_TIMEOUT_SECONDS", 0.3)
    world = World(tmp_path)
    with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
        connection.settimeout(20)
        connection.sendall(
            f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99\r\n\r\n{{".encode()
        )
        answer = connection.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert world.engine.stats.iterations == 0
    world.close()


def test_requests_are_listed_and_each_choice_has_its_story(limited):
    answer = limited.http.post(TEXT, json={"prompt": "abc", "max_tokens": 3, "n": 2}, headers=bearer("free-key")).json()
    told = limited.http.get(f"/requests/{answer['id']}", headers=bearer("free-key")).json()
    assert [row["id"] for row in told["requests"]] == [f"{answer['id']}/0", f"{answer['id']}/1"]
    for row in told["requests"]:
        assert (row["state"], row["prompt_tokens"], row["completion_tokens"]) == ("length", 3, 3)
        assert 0 <= row["waited_ms"] <= row["first_token_ms"] <= row["total_ms"]
        assert "arrived with a prompt of 3 tokens" in row["events"][0]
    listed = limited.http.get("/requests", params={"limit": 2}, headers=bearer("free-key")).json()["data"]
    assert {row["id"] for row in listed} == {row["id"] for row in told["requests"]}
    with limited.typist.hold(), ThreadPoolExecutor() as threads:
        running = threads.submit(limited.http.post, TEXT, json={"prompt": "abc"}, headers=bearer("free-key"))
        limited.wait_for(lambda state: state["running"] == 1)
        row = limited.http.get("/requests", headers=bearer("free-key")).json()["data"][0]
        limited.typist._go.set()
        running.result()
    assert row["state"] == "running"
    assert limited.http.get("/requests?limit=0", headers=bearer("free-key")).status_code == 400


def test_a_trace_is_given_on_demand_and_only_where_it_is_allowed(tmp_path, limited):
    assert limited.http.get("/debug/trace", headers=bearer("free-key")).json()["error"]["code"] == "debug_not_allowed"
    trace = Trace("serve")
    world = World(tmp_path, operations=Operations(debug_trace=trace), trace=trace)
    world.http.post(CHAT, json=HELLO)  # before: not in it
    world.typist.delay = 0.01
    with ThreadPoolExecutor() as threads:
        asked = threads.submit(world.http.get, "/debug/trace", params={"seconds": 1})
        answers = [world.http.post(CHAT, json={**HELLO, "max_tokens": 5}).json()["id"] for _ in range(3)]
        file = tmp_path / "trace.json"
        file.write_bytes(asked.result().content)
    lanes = {span.lane for span in Trace.load(file).spans()}
    assert "engine" in lanes
    assert lanes & {f"request/{answer}" for answer in answers}
    assert lanes <= {"engine", *(f"request/{answer}" for answer in answers)}
    assert world.http.get("/debug/trace?seconds=61").status_code == 400
    world.close()
