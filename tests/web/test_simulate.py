"""Virtual time over HTTP: the command line's answers, bounded, one at a time, gone with who asked."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import time
from pathlib import Path

import httpx
import pytest
from http_world import World

from armillary.cli.main import run
from armillary.cli.settings import EngineFlags
from armillary.cli.simulate_scenario import Hardware
from armillary.cli.workload import Workload
from armillary.serve.http.errors import APIError
from armillary.serve.http.server import Server
from armillary.serve.operations.keys import KeyRing
from armillary.web.app import create_app, create_simulation_app
from armillary.web.simulate import watches
from armillary.web.simulate.body import CapacityBody, ServeBody, Simulation, TraceBody, WatchBody
from armillary.web.simulate.choices import choices

WORKLOAD = {"model": "llama-2-7b", "cluster": "a100", "lengths": "400+40", "requests": 60, "rate": 6.0, "seed": 3}
SLOW = {"model": "llama-2-7b", "cluster": "a100", "slo": "ttft=300ms,tpot=50ms", "tolerance": 0.02}

NO_FIELDS = {
    "trace", "kv_patterns", "offload_folder", "sparsity", "lora",  # name files of this machine
    "speed", "cut",  # of a trace
    "backend", "weight_cache", "threads", "deterministic", "tool_format", "lora_memory", "max_loras",  # of an engine that computes
    "offload", "offload_memory", "offload_compress", "sparsity_share",  # no cost model knows them
}  # fmt: skip


@pytest.fixture(scope="module")
def http():
    with Server(create_simulation_app(), port=0, grace_seconds=1) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        client.headers["connection"] = "close"
        yield client


def test_every_flag_is_a_field_or_is_said_to_be_none():
    flags = {field.name for kind in (Hardware, Workload, EngineFlags) for field in dataclasses.fields(kind)}
    assert flags == (ServeBody.model_fields.keys() - {"model", "slo"}) | NO_FIELDS
    assert not NO_FIELDS & ServeBody.model_fields.keys()


def test_the_form_has_every_field(http):
    form = http.get("/static/simulation_fields.js").text
    shown = set(re.findall(r'name: "(\w+)"', form))
    assert shown == (ServeBody.model_fields.keys() | CapacityBody.model_fields.keys())


def test_the_manual_names_every_field_and_every_path(http):
    manual = (Path(__file__).parents[2] / "docs" / "http.md").read_text()
    named = set(re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", manual, flags=re.DOTALL)))
    for body in (ServeBody, CapacityBody, TraceBody, WatchBody):
        assert body.model_fields.keys() <= named
    for path in http.get("/openapi.json").json()["paths"]:
        assert re.sub(r"\{\w+_id\}", "{id}", path) in manual, path


def test_the_answer_is_that_of_the_command_line(http, capsys):
    told = http.post("/simulate/serve", json=WORKLOAD | {"slo": "ttft=300ms"})
    assert told.status_code == 200, told.text
    facts = told.json()
    command = facts.pop("command").split()
    assert command[:3] == ["armillary", "simulate", "serve"]
    assert run([*command[1:], "--json"]) == 0
    here = json.loads(capsys.readouterr().out)
    del facts["wall_seconds"], here["wall_seconds"]
    assert facts == here


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"cluster": "/etc/cluster.toml"}, "cluster", "files are for the command line"),
        ({"model": "../secrets/config.json"}, "model", "files are for the command line"),
        ({"requests": 30_000}, "requests", "20000"),
        ({"replicas": 1000}, "replicas", "256"),
        ({"lengths": "9000000+1"}, None, "over this server's 100,000,000"),
        ({"polcy": "vllm"}, "polcy", "did you mean 'policy'"),
    ],
)
def test_what_cannot_be_is_named(http, asked, param, says):
    answer = http.post("/simulate/serve", json=WORKLOAD | asked)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize("field", ["model", "draft_model"])
def test_folders_beside_the_server_are_no_models(http, tmp_path, monkeypatch, field):
    (tmp_path / "llama").mkdir()
    monkeypatch.chdir(tmp_path)
    answer = http.post("/simulate/serve", json=WORKLOAD | {field: "llama"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "did you mean llama-" in answer.json()["error"]["message"]


def test_one_at_a_time_and_none_when_the_client_is_gone(http):
    with http.stream("POST", "/simulate/capacity", json=SLOW) as stream:
        lines = stream.iter_lines()
        first = json.loads(next(lines).removeprefix("data: "))
        assert first["command"].startswith("armillary simulate capacity llama-2-7b")
        assert first["probe"]["rate"] > 0
        refused = http.post("/simulate/serve", json=WORKLOAD)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "simulation_running")
        assert int(refused.headers["retry-after"]) > 0
    deadline = time.monotonic() + 20
    while (answer := http.post("/simulate/serve", json=WORKLOAD | {"cluster": "a1000"})).status_code == 429:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cluster")
    assert "did you mean a100" in answer.json()["error"]["message"]


def test_a_watched_engine_is_asked_as_the_served_one(tmp_path):
    keys = KeyRing.of(["a", "b"])
    world = World(tmp_path, app=create_app, api_key=keys)
    alice, bob = ({"authorization": f"Bearer {key}"} for key in "ab")
    try:
        assert world.http.post("/simulate/watch", json=WORKLOAD).status_code == 401
        watch = "/simulate/watch/" + world.http.post("/simulate/watch", json=WORKLOAD, headers=alice).json()["id"]
        live = world.http.get("/live", headers=alice).json()
        at = 3 * 10**9
        seen = world.http.get(watch, params={"at": at, "since": 5}, headers=alice).json()
        assert seen.keys() == live.keys()
        assert (seen["now"], seen["model"]["name"]) == (at, "llama-2-7b")
        assert seen["iterations"][0]["index"] == 6
        assert seen["iterations"][-1]["end"] <= at
        running = seen["requests"][0]["id"]
        (told,) = world.http.get(f"{watch}/requests/{running}", params={"at": at}, headers=alice).json()["requests"]
        assert "arrived with a prompt of 400 tokens" in told["events"][0]
        assert world.http.get(f"{watch}/requests/59", params={"at": at}, headers=alice).status_code == 404
        assert world.http.get(watch, params={"at": -1}, headers=alice).json()["error"]["param"] == "at"
        assert world.http.get(watch, params={"at": at}, headers=bob).status_code == 404
        assert world.http.delete(watch, headers=bob).status_code == 404
        assert world.http.delete(watch, headers=alice).json()["deleted"]
        assert world.http.get(watch, params={"at": at}, headers=alice).status_code == 404
    finally:
        world.close()


def test_processes_that_are_being_started_count(monkeypatch):
    class Starting:
        started = 0

        @classmethod
        async def start(cls, arguments):
            cls.started += 1
            return cls()

        async def heard(self):
            await asyncio.sleep(0)
            raise APIError(400, "it cannot be simulated")

        async def close(self):
            pass

    monkeypatch.setattr(watches, "Simulator", Starting)

    async def together(most):
        mine = watches.Watches(most)
        return await asyncio.gather(*(mine.begin([], "armillary simulate watch") for _ in range(8)), return_exceptions=True)

    for most in (1, 4):
        Starting.started = 0
        statuses = [error.status for error in asyncio.run(together(most))]
        assert Starting.started == min(most, watches.OF_A_KEY)
        assert sorted(statuses) == [400] * Starting.started + [429] * (8 - Starting.started)


def test_simulations_can_be_switched_off(tmp_path):
    world = World(tmp_path, app=create_app, simulations=0)
    try:
        for verb in ("serve", "watch"):
            answer = world.http.post(f"/simulate/{verb}", json=WORKLOAD)
            assert (answer.status_code, answer.json()["error"]["code"]) == (403, "simulations_not_allowed")
    finally:
        world.close()


def test_what_is_offered_can_be_asked_for():
    offered = choices()
    for one in (*offered["models"], *offered["clusters"]):
        Simulation(model=one["name"], cluster=one["name"])
    assert {"llama-2-7b", "deepseek-v3"} <= {one["name"] for one in offered["models"]}
    assert {"a100", "h100", "dgx-h100", "gb200-nvl72"} <= {one["name"] for one in offered["clusters"]}
