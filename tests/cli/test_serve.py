"""`armillary serve` answers over HTTP, keeps its door shut by default, and stops when told."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Command, environment

from armillary.cli.main import INTERRUPTED, MISUSED, TERMINATED
from armillary.cli.run_config import ServerConfig
from armillary.cli.serve import is_loopback, refuse_open_door
from armillary.core.errors import InputError


@contextmanager
def serving(*arguments: object, **variables: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The running command and its URL."""
    process = subprocess.Popen(
        [sys.executable, "-m", "armillary", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment(**variables),
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if " at http://" in line), None)
        if line is None:
            raise AssertionError(f"it did not serve: {process.communicate()}")
        yield process, line.split(" at ")[1].split()[0]
    finally:
        process.kill()
        process.communicate()
        watchdog.cancel()


def ask(url: str, body: dict[str, object] | None = None, key: str | None = None) -> tuple[int, str]:
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_it_answers_and_shows_its_page_and_sigterm_stops_it(tiny_model: Path) -> None:
    with serving("serve", tiny_model, "--port", "0", "--policy", "orca", "--threads", "1") as (process, url):
        assert ask(f"{url}/health")[0] == 200
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5, "temperature": 0, "ignore_eos": True}
        status, text = ask(f"{url}/v1/chat/completions", {"model": json.loads(ask(f"{url}/v1/models")[1])["data"][0]["id"], **body})
        assert status == 200
        assert json.loads(text)["usage"]["completion_tokens"] == 5
        assert "<html" in ask(f"{url}/")[1]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == TERMINATED
        assert "policy orca" in errors
        assert errors.splitlines()[-1] == "stopped"


def test_ctrl_c_during_an_answer_stops_it(tiny_model: Path) -> None:
    with serving("serve", tiny_model, "--port", "0", "--threads", "1") as (process, url):
        name = json.loads(ask(f"{url}/v1/models")[1])["data"][0]["id"]
        body = {"model": name, "prompt": "x", "max_tokens": 2000, "ignore_eos": True}
        client = threading.Thread(target=lambda: ask(f"{url}/v1/completions", body), daemon=True)
        client.start()
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == INTERRUPTED, errors
        assert errors.splitlines()[-2:] == ["stopped", "interrupted"]
        assert "Traceback" not in errors


def test_it_is_run_as_it_is_told(tiny_model: Path, tmp_path: Path) -> None:
    """Keys with limits, an access log, stories, the trace; and SIGTERM lets the answer in flight be finished."""
    keys, log = tmp_path / "keys.toml", tmp_path / "access.jsonl"
    keys.write_text('[alice]\nkey = "from the file"\nrequests_per_minute = 3\n')
    options = (
        "--keys",
        keys,
        "--api-key",
        "one",
        "--api-key",
        "two",
        "--access-log",
        log,
        "--explain",
        "--allow-debug",
        "--shed-after",
        60,
    )
    with serving("serve", tiny_model, "--port", "0", "--threads", "1", *options) as (process, url):
        assert [ask(f"{url}/v1/models", key=key)[0] for key in ("one", "two", "from the file", "three")] == [200, 200, 200, 401]
        assert ask(f"{url}/debug/trace?seconds=0.01", key="one")[0] == 200
        body: dict[str, object] = {"prompt": "x", "max_tokens": 3, "ignore_eos": True}
        statuses = [ask(f"{url}/v1/completions", body, key="from the file")[0] for _ in range(4)]
        assert statuses == [200, 200, 200, 429]
        answers: list[tuple[int, str]] = []
        long = {**body, "max_tokens": 1500}
        client = threading.Thread(target=lambda: answers.append(ask(f"{url}/v1/completions", long, key="two")))
        client.start()
        while not any(row["state"] == "running" for row in json.loads(ask(f"{url}/requests", key="one")[1])["data"]):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        client.join(timeout=60)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == TERMINATED
    assert [status for status, _ in answers] == [200]
    assert json.loads(answers[0][1])["usage"]["completion_tokens"] == 1500
    assert "draining: 1 requests in flight, at most 30 s" in errors
    assert errors.count("in short: waited") >= 3  # the last one may end with the process
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["status"] for line in lines if line["key"] == "alice"] == [200, 200, 200, 200, 429]
    assert "from the file" not in log.read_text() + errors


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (("--keys", "/nowhere/keys.toml"), "/nowhere/keys.toml"),
        (("--access-log", "/nowhere/log"), "the access log /nowhere/log cannot be written"),
        (("--api-key", "a", "--api-key", "a"), "are the same"),
        (("--drain-seconds", "-1"), "drain_seconds"),
    ],
)
def test_what_is_wrong_with_how_it_is_run_is_told_before_torch_is_loaded(
    armillary: Command, tiny_model: Path, option: tuple[str, ...], said: str
) -> None:
    ran = armillary("serve", tiny_model, *option)
    assert ran.returncode == MISUSED
    assert said in ran.stderr
    assert "loading" not in ran.stderr


def test_a_key_from_the_environment_is_required_of_clients(tiny_model: Path) -> None:
    with serving("serve", tiny_model, "--port", "0", "--threads", "1", ARMILLARY_SERVER__API_KEY="open sesame") as (_, url):
        assert ask(f"{url}/v1/models")[0] == 401
        assert ask(f"{url}/v1/models", key="open sesame")[0] == 200


def test_a_taken_port_is_an_error(armillary: Command, tiny_model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ran = armillary("serve", tiny_model, "--port", port)
    assert ran.returncode == MISUSED
    assert f"127.0.0.1:{port}" in ran.stderr
    assert "choose another --port" in ran.stderr
    assert "loading" not in ran.stderr


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (("--context", "4096"), "context 4,096 is more than the 2,048 tokens that the model was made for"),
        (("--kv-memory", "1 KB"), "does not hold one KV block"),
        (("--kv-blocks", "200000000"), "the KV pool would take"),
    ],
)
def test_what_does_not_fit_is_refused_before_torch_is_loaded(
    armillary: Command, tiny_model: Path, wanted: tuple[str, str], said: str
) -> None:
    ran = armillary("serve", tiny_model, *wanted)
    assert ran.returncode == MISUSED
    assert said in ran.stderr
    assert "loading" not in ran.stderr


@pytest.mark.parametrize("wanted", [("--quantize", "int4"), ("--kv-dtype", "fp16"), ("--deterministic",)])
def test_what_torch_does_not_have_is_refused_before_torch_is_loaded(armillary: Command, tiny_model: Path, wanted: tuple[str, ...]) -> None:
    ran = armillary("serve", tiny_model, "--backend", "torch", *wanted)
    assert ran.returncode == MISUSED
    assert f"{wanted[0][2:].replace('-', '_')} needs the native backend" in ran.stderr
    assert "loading" not in ran.stderr


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("example.org", False),
    ],
)
def test_only_this_machines_own_addresses_need_no_key(host: str, loopback: bool, capsys: pytest.CaptureFixture[str]) -> None:
    assert is_loopback(host) is loopback
    open_door = ServerConfig.model_validate({"host": host})
    if loopback:
        refuse_open_door(open_door)
        return
    with pytest.raises(InputError, match="no API key is set"):
        refuse_open_door(open_door)
    refuse_open_door(ServerConfig.model_validate({"host": host, "api_key": "k"}))
    assert capsys.readouterr().err == ""
    refuse_open_door(ServerConfig.model_validate({"host": host, "allow_public": True}))
    assert "WARNING: anyone who can reach" in capsys.readouterr().err
