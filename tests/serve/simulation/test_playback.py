"""Looking at a simulation changes nothing: at every instant, in whatever order, there is what stepping shows then."""

from __future__ import annotations

import threading

import pytest

from armillary.cluster.cluster import cluster
from armillary.core.clock import VirtualClock
from armillary.core.errors import CapacityError, InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.playback import Playback
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import bursty, published, requests
from armillary.serve.workload.requests import arrivals

SHOWN = 10**9  # ns before the instant of which every iteration is there to be drawn


def scenario(replicas=1, **more):
    deployment = Deployment(find("llama-2-7b"), cluster("a100"), Layout(), Precision("fp16", "fp16", "fp16"))
    return Scenario(deployment, EngineConfig(**({"kv_blocks": 400, "max_running": 8} | more)), replicas, "round-robin")


def coming(count=40, rate=4.0):
    return requests(arrivals(bursty(rate, 2.0, 1), published("conversation"), count, 2, limit=4096))


def stepped(what, at):
    """The engine at `at`, one iteration after another."""
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), what.deployment.roofline()), what.settled, fast_forward=False)
    waiting = list(coming())

    def take(until):
        while waiting and waiting[0].arrival <= until:
            engine.submit(waiting.pop(0))

    while True:
        take(engine.clock.now())
        leap = engine.begin()
        if leap is None:
            if not waiting or waiting[0].arrival > at:
                return engine
            engine.virtual_clock.advance_to(waiting[0].arrival)
        else:
            take(min(at, int(leap.ends[0])))
            if leap.ends[0] > at:
                return engine
            engine.end(leap)


def shown(snapshot, at):
    recent = [one for one in snapshot["iterations"] if one["start"] > at - SHOWN]
    return {name: value for name, value in snapshot.items() if name not in ("now", "stats")} | {"iterations": recent}


def test_every_instant_shows_what_stepping_does_forward_and_backward():
    what = scenario()
    playback = Playback(what, coming)
    for seconds in (0, 0.3, 2.5, 2.51, 6, 4):
        at = int(seconds * 1e9)
        engine = stepped(what, at)
        assert shown(playback.snapshot(at), at) == shown(engine.snapshot(), at), seconds
        for name in ("0", "7", "39"):
            assert playback.explain(name, at) == engine.explain(name)
    assert playback.snapshot(10**12)["waiting"] == playback.snapshot(10**12)["running"] == 0
    playback.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "armillary-playback"]


def test_replicas_are_watched_one_at_a_time():
    what = scenario(3)
    done = [Playback(what, coming, replica) for replica in range(3)]
    ends = [one.snapshot(10**12)["stats"]["finished"]["length"] for one in done]
    assert ends == [14, 13, 13]
    with pytest.raises(InputError, match="watch 0 to 2"):
        Playback(what, coming, 3)
    for one in done:
        one.close()


def test_a_simulation_that_fails_says_so_whenever_it_is_looked_at():
    playback = Playback(scenario(max_queue=1), lambda: coming(rate=400))
    for _ in range(2):
        with pytest.raises(CapacityError, match="bound of 1"):
            playback.snapshot(10**10)
    playback.close()
