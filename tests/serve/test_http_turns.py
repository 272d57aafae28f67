"""`priority` and `ttft_ms` over HTTP: refused where the queue would not look at them, and otherwise who goes first."""

from __future__ import annotations

import threading

import pytest
from http_world import World

from armillary.serve.fleet.messages import pack_request, unpack_request
from armillary.serve.request import Request, SamplingParams

PATHS = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}]},
    "/v1/completions": {"prompt": "Hi"},
    "/v1/responses": {"input": "Hi", "store": False},
    "/v1/messages": {"messages": [{"role": "user", "content": "Hi"}], "model": "typist", "max_tokens": 4},
}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made = {
        order: World(tmp_path_factory.mktemp(order), config={"order": order, "max_running": 1})
        for order in ("fcfs", "priority", "deadline")
    }
    yield made
    for world in made.values():
        world.close()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("order", "field"), [("priority", {"priority": -3}), ("deadline", {"ttft_ms": 250.5})])
def test_a_turn_is_asked_for_on_every_path_and_refused_by_name_where_the_order_is_another(worlds, monkeypatch, path, order, field):
    (name,) = field
    seen = []
    submit = worlds[order].engine.submit
    monkeypatch.setattr(worlds[order].engine, "submit", lambda request: (seen.append(request), submit(request)))
    answer = worlds[order].http.post(path, json=PATHS[path] | field)
    assert answer.status_code == 200, answer.text
    (request,) = seen
    assert request.priority == field.get("priority", 0)
    assert request.deadline == (request.arrival + 250_500_000 if name == "ttft_ms" else None)
    refused = worlds["fcfs"].http.post(path, json=PATHS[path] | field)
    assert refused.status_code == 400
    assert name in refused.text
    assert f"--order {order}" in refused.text


@pytest.mark.parametrize(
    "field", [{"ttft_ms": 0}, {"ttft_ms": -1}, {"ttft_ms": "soon"}, {"ttft_ms": 1e12}, {"priority": 2**40}, {"priority": 0.5}]
)
def test_a_value_out_of_range_is_named(worlds, field):
    answer = worlds["deadline"].http.post("/v1/completions", json={"prompt": "Hi"} | field)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == next(iter(field))


def test_the_lower_priority_number_is_computed_first(worlds):
    world, served = worlds["priority"], []
    world.typist.reply = lambda request: served.append(request.priority) or "x"

    def ask(priority: int) -> None:
        assert world.http.post("/v1/completions", json={"prompt": "Hi", "max_tokens": 1, "priority": priority}).status_code == 200

    threads = [threading.Thread(target=ask, args=(priority,)) for priority in (0, 5, 1, -1)]
    with world.typist.hold():
        for count, thread in enumerate(threads, 1):
            thread.start()
            world.wait_for(lambda state, count=count: state["running"] + state["waiting"] == count)
    for thread in threads:
        thread.join()
    assert served == [0, -1, 1, 5]


def test_a_deadline_reaches_a_replica_as_what_is_left_of_it():
    request = Request("r", (1, 2), SamplingParams(), priority=4, deadline=1_000)
    assert unpack_request(pack_request(request, now=400), now=7_000_000).deadline == 7_000_600
    request.deadline = None
    unpacked = unpack_request(pack_request(request, now=400), now=7_000_000)
    assert (unpacked.deadline, unpacked.priority) == (None, 4)
