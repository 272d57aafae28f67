"""Replicas as Ray actors: the same answers, also after one is killed."""

import os
import signal

import pytest
from fleet_models import scripted_engine
from test_fleet import ENGINE, make, run, same, those

from armillary.core.errors import CapacityError
from armillary.serve.fleet.fleet import Blueprint

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow


def free(name, **more):
    """Those without a grammar, of which the executor of these engines knows nothing."""
    pairs = [pair for pair in zip(*those(name, **more), strict=True) if pair[1].constraint is None]
    return [listener for listener, _ in pairs], [request for _, request in pairs]


def test_actors_answer_like_one_engine_and_one_that_is_killed_is_replaced(monkeypatch):
    from armillary.serve.fleet.ray import RayLauncher

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    alone = scripted_engine(ENGINE).engine
    try:
        with pytest.raises(CapacityError, match="want 999 CPUs"):
            RayLauncher(999, 1)
        launcher = RayLauncher(2, 0.5)
        blueprint = Blueprint("fleet_models:scripted_engine", {"engine": ENGINE})
        fleet = make(blueprint, launcher=launcher, ray=True)
        fleet.start()
        try:
            same(run(fleet, *free("a")), run(alone, *free("a")))
            pids = [process.pid for process in fleet._processes]
            assert len({*pids, os.getpid()}) == 3
            killed = []

            def kill():
                if not killed:
                    with fleet._lock:
                        killed.append(max(fleet._processes, key=lambda process: len(process.member.attempts)).pid)
                    os.kill(killed[0], signal.SIGKILL)

            long = {"max_tokens": 150}
            same(run(fleet, *free("b", at=5, then=kill, **long)), run(alone, *free("b", **long)))
            assert fleet.dispatcher.stats.deaths == 1
        finally:
            fleet.stop()
    finally:
        ray.shutdown()
