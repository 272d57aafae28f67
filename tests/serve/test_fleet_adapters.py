"""Adapters of a fleet: on every replica or on none, on those that are started later too, and weights that no request loses."""

import shutil
import socket
import threading

import pytest
from adapters import adapter, merged, write
from fastapi.testclient import TestClient
from fleet_models import ThreadLauncher
from models import greedy, loaded, tiny
from test_fleet import ENGINE, Listener, asked, make, wait

from armillary.core.errors import InputError
from armillary.serve import adapters as adapter_store
from armillary.serve.fleet import adapters as fleet_adapters
from armillary.serve.http.app import create_app
from armillary.serve.http.operations import Operations
from armillary.serve.service import Service

BASE = tiny(seed=0, num_layers=3)
MADE = {"one": adapter(BASE.config, 1, rank=3), "two": adapter(BASE.config, 2, rank=18)}
PROMPT = [5, 70, 33, 12, 8]
ASK = {"prompt": PROMPT, "max_tokens": 8, "temperature": 0, "ignore_eos": True}


def text_of(name):
    tokens, gap = greedy(merged(BASE, MADE[name]), PROMPT, 8)
    assert gap > 1e-3
    return loaded(BASE).tokenizer.decode(tokens)


@pytest.fixture
def folder(tmp_path):
    for name, low in MADE.items():
        write(tmp_path / name, BASE.config, low)
    return tmp_path


@pytest.fixture
def fleet(folder):
    made = make(engine={**ENGINE, "lora": {"one": str(folder / "one")}}, router="round-robin", launcher=ThreadLauncher())
    made._blueprint.arguments["engine"]["lora"] = {}  # as `build_fleet` does
    made.start()
    yield made
    made.stop()


@pytest.fixture
def client(fleet, folder):
    return TestClient(create_app(Service(fleet, loaded(BASE)), allowed_hosts=("*",), operations=Operations(adapter_directory=folder)))


def said(client, name):
    """What each of the two replicas says in turn."""
    return [client.post("/v1/completions", json={**ASK, "model": name}).json()["choices"][0]["text"] for _ in range(2)]


def served(client):
    return [card["id"] for card in client.get("/v1/models").json()["data"]][1:]


def load(client, name, path, **more):
    return client.post("/v1/load_lora_adapter", json={"lora_name": name, "lora_path": path, **more})


def rows(fleet):
    return fleet.snapshot()["features"]["adapters"]["adapters"]


def hang_up(fleet, index):
    """The replica is lost, and another takes its place."""
    process, deaths = fleet._processes[index], fleet.dispatcher.members[index].deaths
    process.started.connection.shutdown(socket.SHUT_RDWR)
    wait(lambda: process.member.deaths > deaths and process.member.health == "open")


def test_adapters_come_and_go_on_every_replica(fleet, client, monkeypatch):
    assert said(client, "one") == [text_of("one")] * 2
    assert load(client, "two", "two").status_code == 200
    assert said(client, "two") == [text_of("two")] * 2
    for index in range(2):
        hang_up(fleet, index)
    assert said(client, "two") == [text_of("two")] * 2
    assert said(client, "one") == [text_of("one")] * 2
    told = [("one", 3, 0, 2), ("two", 18, 0, 2)]  # from the replicas' next signs of life
    wait(lambda: [(row["name"], row["rank"], row["running"], row["requests"]) for row in rows(fleet)] == told)
    assert fleet.snapshot()["features"]["adapters"]["loaded"] == 4
    assert 'armillary_adapter_requests_unfinished{adapter="two",model_name="tiny"} 0.0' in client.get("/metrics").text

    monkeypatch.setattr(fleet_adapters, "KEPT_SECONDS", 0.0)
    begun = threading.Event()
    listener = Listener(at=3, then=begun.set)
    alone, running = asked("alone", PROMPT, Listener(), max_tokens=180), asked("running", PROMPT, listener, max_tokens=180)
    alone.adapter = running.adapter = fleet.adapters.key("one")
    fleet.submit(alone)
    fleet.run_until_idle()
    fleet.submit(running)
    begun.wait(60)
    assert load(client, "one", "two").status_code == 400
    assert load(client, "one", "two", load_inplace=True).status_code == 200
    assert client.post("/v1/unload_lora_adapter", json={"lora_name": "two"}).status_code == 200
    assert served(client) == ["one"]
    assert said(client, "one") == [text_of("two")] * 2
    assert client.post("/v1/completions", json={**ASK, "model": "two"}).status_code == 404
    with fleet._lock:
        ticket = fleet.dispatcher.tickets.get("running")
        at = ticket.attempts[0].member.index if ticket is not None and ticket.attempts else 0
    hang_up(fleet, at)
    fleet.run_until_idle()
    assert running.output == alone.output  # the weights that it began with, on whichever replica
    wait(lambda: len(rows(fleet)) == 1)
    wait(lambda: fleet.snapshot()["features"]["adapters"]["loaded"] == 2)


def test_what_one_replica_cannot_load_none_serves(fleet, client, folder, monkeypatch):
    real, failed = adapter_store.read_lora, []

    def broken(path, *given):
        if not failed and threading.current_thread().name.startswith("replica-adapters"):
            failed.append(path)
            raise InputError("the disk is broken", "repair it", field="lora_path")
        return real(path, *given)

    monkeypatch.setattr(adapter_store, "read_lora", broken)
    for name, inplace in (("two", False), ("one", True)):
        failed.clear()
        answer = load(client, name, "two", load_inplace=inplace)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "lora_path"
        assert answer.json()["error"]["message"].startswith(("replica 0: the disk is broken", "replica 1: the disk is broken"))
        assert served(client) == ["one"]
        assert said(client, "one") == [text_of("one")] * 2
    assert client.post("/v1/completions", json={**ASK, "model": "two"}).status_code == 404
    assert load(client, "none", "nothing").status_code == 404
    wait(lambda: fleet.snapshot()["features"]["adapters"]["loaded"] == 2)  # whoever could has dropped it
    monkeypatch.setattr(fleet_adapters, "LOAD_SECONDS", 0.0)
    late = load(client, "two", "two")
    assert late.status_code == 503
    assert "replica 0, 1 has not loaded adapter 'two' within 0 s" in late.json()["error"]["message"]
    assert served(client) == ["one"]


def test_a_replica_that_finds_other_files_takes_no_requests(fleet, client, folder):
    shutil.copytree(folder / "two", folder / "one", dirs_exist_ok=True)
    process = fleet._processes[0]
    process.started.connection.shutdown(socket.SHUT_RDWR)
    wait(lambda: process.member.deaths >= 2)  # the one that was started again has been sent away
    assert said(client, "one") == [text_of("one")] * 2
    assert load(client, "one", "one", load_inplace=True).status_code == 200
    wait(lambda: process.member.health == "open")
    assert said(client, "one") == [text_of("two")] * 2


def test_an_adapter_that_is_not_there_is_said_at_the_start(folder):
    made = make(engine={**ENGINE, "lora": {"none": str(folder / "none")}}, launcher=ThreadLauncher())
    made._blueprint.arguments["engine"]["lora"] = {}
    with pytest.raises(Exception, match=r"replica \d: .*none"):
        made.start()
    made.stop()
