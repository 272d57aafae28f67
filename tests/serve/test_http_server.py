"""The server itself: guards, bounds, operations, load, and bodies that mean harm."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import signal
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from http_world import GREETING, World
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from armillary.core.errors import InputError
from armillary.serve.http.app import create_app
from armillary.serve.http.schemas.chat import ChatBody
from armillary.serve.http.schemas.completions import CompletionBody
from armillary.serve.http.server import Server

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("world"))
    yield world
    world.close()


def error_of(response: httpx.Response) -> dict:
    """The error of an OpenAI error body; fails when the answer is anything else."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    assert isinstance(body["error"]["type"], str)
    return body["error"]


def post(world, content: bytes | str, path: str = CHAT, **headers) -> httpx.Response:
    return world.http.post(path, content=content, headers={"content-type": "application/json", **headers})


# -- operations


def test_health_and_version(world):
    assert world.http.get("/health").json() == {"status": "ok"}
    assert set(world.http.get("/version").json()) == {"version", "model"}


def test_health_says_when_the_engine_is_down(tmp_path):
    world = World(tmp_path)
    world.engine.stop()
    response = world.http.get("/health")
    assert response.status_code == 503
    assert error_of(response)["code"] == "engine_stopped"
    assert world.http.post(CHAT, json=HELLO).status_code == 503  # and nobody waits for an answer that cannot come
    world.close()


def test_tokenize_and_detokenize_are_inverse(world):
    text = "né <|im_end|> 👋"
    tokens = world.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert tokens["count"] == len(tokens["tokens"]) == len(tokens["token_strs"])
    assert tokens["max_model_len"] == 512
    assert "<|im_end|>" in tokens["token_strs"]
    assert world.http.post("/detokenize", json={"tokens": tokens["tokens"]}).json() == {"prompt": text}
    rendered = world.http.post("/tokenize", json=HELLO).json()["tokens"]
    assert (
        world.http.post("/detokenize", json={"tokens": rendered}).json()["prompt"]
        == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("body", [{}, {"prompt": "a", **HELLO}, {"prompt": 3}])
def test_tokenize_takes_either_a_prompt_or_messages(world, body):
    assert error_of(world.http.post("/tokenize", json=body))


@pytest.mark.parametrize("tokens", [[-1], [258], [10**30], ["a"], [1.5], [True], None])
def test_detokenize_refuses_tokens_that_do_not_exist(world, tokens):
    response = world.http.post("/detokenize", json={"tokens": tokens})
    assert response.status_code == 400
    assert error_of(response)


def samples(world) -> dict[str, float]:
    """Every sample of /metrics without a histogram bucket, keyed by name and (where there is one) finished_reason."""
    found = {}
    for family in text_string_to_metric_families(world.http.get("/metrics").text):
        for sample in family.samples:
            if not sample.name.endswith("_bucket"):
                assert sample.labels["model_name"] == "typist"
                found[sample.name + sample.labels.get("finished_reason", "")] = sample.value
    return found


def test_metrics_count_what_happened(world):
    before = samples(world)
    for _ in range(3):
        assert world.http.post(CHAT, json={**HELLO, "max_tokens": 5}).json()["usage"]["completion_tokens"] == 5
    world.http.post(CHAT, json=HELLO)
    after = samples(world)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0)

    generated = 3 * 5 + len(GREETING.encode()) + 1
    for prefix, e2e, tokens in (
        ("armillary_", "request_latency_seconds", "generated"),
        ("vllm:", "e2e_request_latency_seconds", "generation"),
    ):
        assert grew(f"{prefix}time_to_first_token_seconds_count") == 4
        assert grew(f"{prefix}inter_token_latency_seconds_count") == generated - 4
        assert grew(f"{prefix}{e2e}_count") == 4
        assert grew(f"{prefix}request_prompt_tokens_sum") == 4 * 21
        assert grew(f"{prefix}prompt_tokens_total") == 4 * 21
        assert grew(f"{prefix}{tokens}_tokens_total") == generated
        assert grew(f"{prefix}request_{tokens}_tokens_sum") == generated
        iterations = f"{prefix}iteration_tokens" + ("_total" if prefix == "vllm:" else "")
        reused = grew(f"{prefix}prefix_cache_hits_total")
        assert reused in (3 * 16, 4 * 16)  # whole blocks of what an earlier request computed
        assert grew(f"{prefix}prefix_cache_queries_total") == 4 * 21
        assert grew(f"{iterations}_sum") == 4 * 21 - reused + generated - 4  # every token but the last drawn of each request is computed
        assert after[f"{iterations}_count"] == after["armillary_iterations_total"]
        assert after[f"{prefix}cache_config_info"] == 1
    assert grew("armillary_requests_finished_totallength") == grew("vllm:request_success_totallength") == 3
    assert grew("armillary_requests_finished_totalstop") == grew("vllm:request_success_totalstop") == 1
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == after["vllm:kv_cache_usage_perc"] == 0
    # A request's life is its queue, its prefill and its decode.
    parts = sum(grew(f"armillary_request_{part}_seconds_sum") for part in ("queue", "prefill", "decode"))
    assert parts == pytest.approx(grew("armillary_request_latency_seconds_sum"), rel=1e-6)


def test_metrics_show_requests_in_flight(world):
    async def three():
        async with httpx.AsyncClient(base_url=world.url, timeout=30) as client:
            calls = [asyncio.create_task(client.post(CHAT, json=HELLO)) for _ in range(3)]
            while world.engine.snapshot()["running"] + world.engine.snapshot()["waiting"] < 3:
                await asyncio.sleep(0.005)
            held.update(samples(world))
            go()
            await asyncio.gather(*calls)

    held: dict[str, float] = {}
    hold = world.typist.hold()
    hold.__enter__()

    def go():
        hold.__exit__(None, None, None)

    asyncio.run(three())
    assert held["armillary_requests_running"] + held["armillary_requests_waiting"] == 3
    assert 0 < held["armillary_kv_cache_usage_ratio"] <= 1


def test_vllm_names_can_be_left_out(tmp_path):
    world = World(tmp_path, vllm_metrics=False)
    text = world.http.get("/metrics").text
    world.close()
    assert "armillary_requests_running" in text
    assert "vllm:" not in text


def test_openapi_describes_the_bodies(world):
    schema = world.http.get("/openapi.json").json()
    body = schema["paths"][CHAT]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body["properties"]["temperature"]["maximum"] == 2
    assert "$ref" not in json.dumps(body)


# -- guards


@pytest.fixture(scope="module")
def locked(tmp_path_factory):
    world = World(tmp_path_factory.mktemp("locked"), api_key="s3cret-käy", cors_origins=["https://friend.example"])
    yield world
    world.close()


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Bearer", "Basic s3cret-käy", "s3cret-käy", "Bearer s3cret-kä"])
def test_without_the_key_nothing_is_told(locked, authorization, caplog):
    headers = {} if authorization is None else {"authorization": authorization.encode()}
    for path in (CHAT, "/v1/models", "/metrics", "/tokenize", "/version", "/openapi.json", "/nowhere"):
        response = locked.http.get(path, headers=headers)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
        assert "s3cret" not in response.text
    assert "s3cret" not in caplog.text


def test_with_the_key_everything_is(locked):
    headers = {"authorization": "Bearer s3cret-käy".encode()}
    assert locked.http.get("/v1/models", headers=headers).status_code == 200
    assert locked.http.post(CHAT, json=HELLO, headers=headers).json()["choices"][0]["message"]["content"] == GREETING
    assert locked.http.get("/health").status_code == 200


def test_an_empty_key_is_refused_at_the_start(tmp_path):
    with pytest.raises(InputError, match="API key is empty"):
        World(tmp_path, api_key=" ")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example", "", "[::1].evil"]
)
def test_foreign_hosts_get_nothing(world, host):
    response = world.http.get("/v1/models", headers={"host": host})
    assert response.status_code == 403
    assert error_of(response)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:80", "[::1]:8000", "[::1]"])
def test_loopback_hosts_are_answered(world, host):
    assert world.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_no_foreign_page_may_read_or_post_by_default(world):
    preflight = {
        "origin": "https://evil.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "content-type",
    }
    response = world.http.options(CHAT, headers=preflight)
    assert response.status_code >= 400
    assert "access-control-allow-origin" not in response.headers
    simple = world.http.post(CHAT, content=json.dumps(HELLO), headers={"origin": "https://evil.example", "content-type": "text/plain"})
    assert simple.status_code == 415
    assert error_of(simple)["code"] == "unsupported_media_type"


def test_named_origins_are_let_in(locked):
    preflight = {
        "origin": "https://friend.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization",
    }
    assert locked.http.options(CHAT, headers=preflight).headers["access-control-allow-origin"] == "https://friend.example"
    assert "access-control-allow-origin" not in locked.http.options(CHAT, headers={**preflight, "origin": "https://evil.example"}).headers


def test_a_taken_port_is_named(world):
    with pytest.raises(InputError, match=f"{world.server.port}.*choose another --port"):
        Server(lambda scope, receive, send: None, port=world.server.port)


# -- bad input


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 400, "invalid_json"),
        (b"{", 400, "invalid_json"),
        (b"[]", 400, "invalid_type"),
        (b'"hi"', 400, "invalid_type"),
        (b"null", 400, "invalid_type"),
        (b'{"messages": "\xff"}', 400, "invalid_utf8"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "invalid_json"),
        (b'{"temperature": NaN}', 400, "invalid_json"),
        (b'{"temperature": Infinity}', 400, "invalid_json"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', 400, "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1e3}', 400, "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 4000 + b"}", 400, "invalid_value"),
        (b'{"messages": [{"role": "user", "content": "x"}], "seed": -1}', 400, "invalid_value"),
        (b'{"a":' * 100_000, 400, "nested_too_deep"),
        (b"[" * 1_000_000, 400, "nested_too_deep"),
        (b"{" + b", ".join(b'"k%d": 1' % number for number in range(50_000)) + b"}", 400, "unknown_parameter"),
        (b'{"messages": [' + b"1," * 500_000 + b"1]}", 400, "invalid_value"),
        (b" " * (4 * 1024 * 1024 + 1), 413, "body_too_large"),
    ],
)
def test_bodies_that_are_no_request(world, content, status, code):
    response = post(world, content)
    assert response.status_code == status
    assert error_of(response)["code"] == code
    assert len(response.text) < 2_000  # the answer does not repeat the input
    assert world.http.get("/health").status_code == 200


def test_a_client_that_writes_all_before_it_reads_learns_that_the_body_is_too_large(world):
    """A reset connection instead would look like a network that failed, and be tried again."""
    for size in (5_000_000, 20_000_000):
        connection = http.client.HTTPConnection("127.0.0.1", world.server.port, timeout=30)
        connection.request("POST", CHAT, b" " * size, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 413
        assert json.loads(response.read())["error"]["code"] == "body_too_large"
        connection.close()


def test_a_body_that_hides_its_size_is_bounded_too(world):
    def endless():
        while True:
            yield b" " * 65536

    # The server answers and closes while the client still writes, which some systems report as a reset connection.
    with contextlib.suppress(httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        response = world.http.post(CHAT, content=endless(), headers={"content-type": "application/json"})
        assert response.status_code == 413
    assert world.http.get("/health").status_code == 200


def test_unknown_paths_and_methods(world):
    assert error_of(world.http.get("/v2/models"))["code"] == "not_found"
    response = world.http.get(CHAT)
    assert response.status_code == 405
    assert error_of(response)


def test_a_template_that_refuses_is_a_bad_request(world):
    body = {"messages": [{"role": "refuse me", "content": ""}]}
    assert world.http.post(CHAT, json=body).status_code == 400


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_half_a_request_then_silence_harms_nobody(world, path):
    with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
        connection.sendall(
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{{".encode()
        )
        assert world.http.post(CHAT, json=HELLO).status_code == 200
    assert world.http.get("/health").status_code == 200


def test_garbage_instead_of_http(world):
    for garbage in (
        b"\x00" * 1000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01",
    ):
        with socket.create_connection(("127.0.0.1", world.server.port)) as connection:
            connection.settimeout(5)
            try:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.recv(4096)
            except OSError:
                answer = b""
            assert b" 200 " not in answer.split(b"\r\n")[0]
    assert world.http.get("/health").status_code == 200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = [
    "model",
    "max_tokens",
    "max_completion_tokens",
    "n",
    "stream",
    "stream_options",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "logit_bias",
    "logprobs",
    "top_logprobs",
    "echo",
    "tools",
    "store",
    "user",
    "best_of",
    "response_format",
    "prompt",
    "messages",
    "tokens",
]
plausible = st.sampled_from(
    [0, 1, -1, 2, 16, 0.5, 1.0, -0.0, 1e308, True, False, "", "a", "typist", ["a"], [1], [[1, 2]], {}, {"1": 1}, None, 2**63, 2**63 - 1]
)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant", "tool", ""]), "content": plausible | json_values}),
    max_size=3,
)


@pytest.mark.parametrize("path", [CHAT, "/v1/completions", "/tokenize", "/detokenize"])
def test_no_body_brings_the_server_down(world, path):
    good = {CHAT: HELLO, "/v1/completions": {"prompt": "a"}, "/tokenize": {"prompt": "a"}, "/detokenize": {"tokens": [1]}}[path]

    @settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        fields=st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), plausible | json_values, max_size=4),
        base=st.just(good) | st.just({}) | st.builds(lambda value: {"messages": value}, messages),
    )
    def fuzz(fields, base):
        response = post(world, json.dumps({**base, **fields}), path)
        assert response.status_code in (200, 400, 404), response.text
        if response.status_code != 200:
            error_of(response)

    fuzz()
    assert world.http.post(CHAT, json=HELLO).json()["choices"][0]["message"]["content"] == GREETING
    world.wait_idle()


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_bring_the_server_down(world, raw):
    assert error_of(post(world, raw))


# -- load


def test_a_full_queue_says_when_to_come_back(tmp_path):
    world = World(tmp_path, config={"max_queue": 4, "max_running": 1})

    async def crowd():
        async with httpx.AsyncClient(base_url=world.url, timeout=30) as client:
            # One after another: a fifth that came before the engine took the first from the queue would be refused itself.
            calls = []
            for count in range(1, 6):
                calls.append(asyncio.create_task(client.post(CHAT, json=HELLO)))
                async with asyncio.timeout(20):
                    while (state := world.engine.snapshot())["running"] + state["waiting"] < count or not state["running"]:
                        await asyncio.sleep(0.005)
            refused = [await client.post(CHAT, json={**HELLO, **extra}) for extra in ({}, {"stream": True}, {"n": 2})]
            state = world.engine.snapshot()
            go.__exit__(None, None, None)
            return refused, state, await asyncio.gather(*calls)

    go = world.typist.hold()
    go.__enter__()
    refused, state, answered = asyncio.run(crowd())
    for response in refused:
        assert response.status_code == 429
        assert int(response.headers["retry-after"]) >= 1
        assert error_of(response)["code"] == "overloaded"
        assert "bound of 4" in error_of(response)["message"]
    assert state["waiting"] == 4  # a refused group leaves no half behind
    assert [response.json()["choices"][0]["message"]["content"] for response in answered] == [GREETING] * 5
    world.close()


def test_two_thousand_requests_all_come_home(world):
    async def one(number):  # a connection each, which httpx's pool is too slow for
        reader, writer = await asyncio.open_connection("127.0.0.1", world.server.port)
        body = json.dumps({"prompt": f"{number}", "max_tokens": 6})
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        answer = await reader.read()
        writer.close()
        head, _, content = answer.partition(b"\r\n\r\n")
        return head.split(b"\r\n")[0], json.loads(content)

    async def flood():
        return await asyncio.gather(*(one(number) for number in range(2_000)))

    world.typist.reply = lambda request: world.tokenizer.decode(request.prompt)
    answers = asyncio.run(flood())
    world.typist.reply = lambda request: GREETING
    assert {status for status, _ in answers} == {b"HTTP/1.1 200 OK"}
    assert [answer["choices"][0]["text"] for _, answer in answers] == [f"{number}" for number in range(2_000)]
    world.wait_idle()


def test_a_client_that_does_not_read_does_not_hold_up_the_others(world):
    world.typist.reply = lambda request: "y" * 10_000
    body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": True, "logprobs": 20})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", world.server.port))
        lazy.sendall((head + body).encode())
        world.wait_for(lambda state: state["running"] >= 1)
        other = world.http.post("/v1/completions", json={"prompt": "b", "max_tokens": 400}).json()
        assert other["usage"]["completion_tokens"] == 400
        world.wait_idle()  # the engine has finished the lazy reader's request too
    world.typist.reply = lambda request: GREETING
    assert world.http.post(CHAT, json=HELLO).status_code == 200


def test_a_client_that_never_reads_is_let_go(tmp_path, monkeypatch):
    monkeypatch.setattr("armillary.serve.http.sse.WRITE_TIMEOUT_SECONDS", 0.5)
    world = World(tmp_path, config={"kv_blocks": 4096})
    world.typist.reply = lambda request: "y" * 10_000
    world.typist.delay = 0.02
    body = json.dumps({"prompt": "a", "max_tokens": 500, "stream": True, "logprobs": 20, "n": 64})  # some 40 MB, over what sockets hold
    with socket.socket() as lazy:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        lazy.connect(("127.0.0.1", world.server.port))
        lazy.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        world.wait_for(lambda state: state["running"] >= 1)
        world.wait_idle(60)
    assert world.engine.stats.finished["cancelled"] > 0
    world.close()


def test_stopping_ends_what_is_in_flight(tmp_path):
    world = World(tmp_path)
    world.typist.delay = 0.01
    world.typist.reply = lambda request: "z" * 10_000
    with world.http.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
        lines = response.iter_lines()
        next(lines)
        world.server.stop()
        world.wait_idle()
    world.close()


def test_answers_that_outlive_the_grace_end_with_words(tmp_path, caplog):
    """Not cut in mid-sentence: streams get an error event and [DONE], whole answers a 503, and the log no tracebacks."""
    world = World(tmp_path)
    world.typist.delay = 0.02
    world.typist.reply = lambda request: "z" * 10_000
    server = Server(create_app(world.service), port=0, grace_seconds=1, end_answers=world.engine.stop).start()
    with httpx.Client(base_url=server.url, timeout=60) as http, ThreadPoolExecutor() as threads:
        streams = [threads.submit(http.post, CHAT, json={**HELLO, "stream": True, "max_tokens": 450}) for _ in range(3)]
        whole = threads.submit(http.post, CHAT, json={**HELLO, "max_tokens": 450})
        world.wait_for(lambda state: state["running"] == 4)
        server.stop()
        for stream in streams:
            *_, last, done = [line for line in stream.result().text.splitlines() if line]
            assert done == "data: [DONE]"
            assert json.loads(last.removeprefix("data: "))["error"]["code"] == "cancelled"
        assert whole.result().status_code == 503
        assert error_of(whole.result())["code"] == "cancelled"
    assert "Traceback" not in caplog.text
    assert "Cancel" not in caplog.text
    world.close()


# -- what the manual says


@pytest.mark.parametrize("schema", [ChatBody, CompletionBody])
def test_the_manual_names_every_field_and_every_path(world, schema):
    manual = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    named = set(re.findall(r"`([^`]+)`", manual))
    assert {*schema.model_fields, *schema.IGNORED} <= named
    for path in world.http.get("/openapi.json").json()["paths"]:
        assert re.sub(r"\{\w+_id\}", "{id}", path) in manual, path


def test_ctrl_c_ends_run_by_keyboard_interrupt_even_where_the_event_loop_lost_it(monkeypatch):
    server = Server(app=None, port=0)
    monkeypatch.setattr(server._server, "run", lambda sockets: server._server.handle_exit(signal.SIGINT, None))
    with pytest.raises(KeyboardInterrupt):
        server.run()
