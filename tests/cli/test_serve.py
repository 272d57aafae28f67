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
