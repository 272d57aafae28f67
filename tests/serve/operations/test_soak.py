"""A small soak: a crowd at random over real HTTP on a tiny model, and nothing is lost, leaked or remembered. bench/soak.py is the long one."""

from __future__ import annotations

import gc
import importlib
from pathlib import Path

import pytest
from http_world import World
from models import loaded, tiny

from armillary.core.trace import Trace
from armillary.serve.http.access_log import AccessLog
from armillary.serve.http.drain import Drain
from armillary.serve.http.operations import Operations
from armillary.serve.request import Request

BENCH = Path(__file__).resolve().parents[3] / "bench"
TEMPLATE = "{% for message in messages %}{{ message.content }};{% endfor %}"


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("soak_clients")


def requests() -> list[Request]:
    return [found for found in gc.get_objects() if type(found) is Request]


def test_a_crowd_leaves_nothing_behind(tmp_path, clients):
    before = {id(one) for one in requests()}
    model = loaded(tiny(seed=3, max_context=512), TEMPLATE)
    config = {
        "kv_blocks": 96,
        "block_size": 8,
        "max_batch_tokens": 64,
        "max_running": 12,
        "max_queue": 64,
        "async_scheduling": "on",
    }
    with (tmp_path / "log").open("w") as log:
        drain = Drain()
        operations = Operations(access_log=AccessLog(log), drain=drain)
        world = World(tmp_path, loaded=model, config=config, operations=operations, trace=Trace("soak", capacity=10_000))
        report = clients.run(world.server.port, "tiny", seconds=2.5, rate=50.0, seed=7)
        world.wait_idle()  # no block is in use, and the books are right
        world.wait_for(lambda state: not drain.in_flight)
        stats = world.engine.stats
        assert report.violations == []
        assert report.ended("finished") > 50
        assert report.ended("left") > 5
        assert report.ended("rejected") > 2
        assert report.repeats > 10
        assert stats.reused_tokens > 0
        assert stats.failed_iterations == 0
        assert stats.finished["error"] == 0
        world.close()
    assert len((tmp_path / "log").read_text().splitlines()) <= sum(report.outcomes.values())  # half a body may never become a request
    gc.collect()
    assert [one.id for one in requests() if id(one) not in before] == []  # nobody remembers them
