"""A cluster in virtual time: one replica is the engine alone, leaps change nothing, and queues obey their laws."""

from itertools import islice

import numpy as np
import pytest

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.fleet.queueing import first_token
from armillary.serve.policies import routing
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.workload import fixed, poisson, published, requests
from armillary.serve.workload.requests import arrivals
from armillary.sim.costs import Decoding, Linear

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))


def engines(count, recorder, cost=COST, fast=True, told=False, **options):
    config = EngineConfig(**{"kv_blocks": 2000, "max_batch_tokens": 512, "max_running": 64, "max_queue": 10**6, **options})
    return [
        VirtualEngine(VirtualExecutor(VirtualClock(), cost), config, recorder=recorder, fast_forward=fast, told=told) for _ in range(count)
    ]


def workload(count, rate, seed=0):
    return requests(arrivals(poisson(rate, seed), published("conversation"), count, seed, limit=8000))


def columns(recorder):
    result = recorder.result()
    order = np.lexsort((result.prompt, result.arrival))
    return {name: getattr(result, name)[order].tolist() for name in ("arrival", "first_scheduled", "first_token", "finished", "answer")}


def test_one_replica_is_the_engine_alone():
    alone, cluster = Recorder(), Recorder()
    replay(engines(1, alone)[0], workload(40, 4))
    Cluster(engines(1, cluster), routing.get("round-robin")).run(workload(40, 4))
    assert columns(alone) == columns(cluster)


@pytest.mark.parametrize("router", ["power-of-two", "shortest-queue", "cache-aware"])
def test_leaps_change_nothing_in_a_cluster(router):
    seen = []
    for fast in (False, True):
        recorder = Recorder()
        Cluster(engines(3, recorder, fast=fast), routing.get(router), seed=5).run(workload(45, 12))
        seen.append(columns(recorder))
    assert seen[0] == seen[1]


def lindley(arrivals, service):
    """Of a queue with one server: each request begins when it has come and the one before it is served."""
    free, begun = 0, []
    for at in arrivals:
        begun.append(max(at, free))
        free = begun[-1] + service
    return begun


def test_prompts_alone_are_a_queue_with_one_server():
    """To the ns the recursion, whose mean is M/D/1's formula within 2 %."""
    recorder, service, rate = Recorder(), 100_000_000, 6.0
    cost = Linear("constant", service, 0, 0, Decoding(1, 0, 0))
    coming = list(islice(poisson(rate, 1), 300_000))
    Cluster(engines(1, recorder, cost, policy="orca", max_running=1), routing.get("round-robin")).run(
        requests(arrivals(coming, fixed(8, 1), 2000))
    )
    begun = lindley(coming, service)
    assert recorder.result().first_scheduled.tolist() == begun[:2000]
    mean = np.mean(np.array(begun) + service - coming) / 1e9
    assert mean == pytest.approx(first_token(service / 1e9, rate), rel=0.02)


def test_littles_law():
    """L = lambda W: the time average of requests in the system, counted from instants, within 1 %."""
    recorder = Recorder()
    Cluster(engines(2, recorder), routing.get("power-of-two")).run(workload(600, 4))
    result = recorder.result()
    instants = np.concatenate([result.arrival, result.finished])
    change = np.concatenate([np.ones(len(result.arrival)), -np.ones(len(result.finished))])
    order = np.argsort(instants, kind="stable")
    inside, span = np.cumsum(change[order])[:-1], np.diff(instants[order])
    mean = (inside * span).sum() / result.makespan
    rate, stay = len(result.arrival) / result.makespan, (result.finished - result.arrival).mean()
    assert mean == pytest.approx(rate * stay, rel=0.01)


def test_work_is_conserved_whatever_the_order():
    """The server is never idle while somebody waits: iterations of equal prompts end at the same instants under every order."""
    ends = []
    for order in ("fcfs", "sjf"):
        recorder = Recorder()
        Cluster(engines(1, recorder, policy="orca", order=order, max_running=1), routing.get("round-robin")).run(
            requests(arrivals(poisson(3, 2), published("code"), 100, limit=8000))
        )
        ends.append(recorder.result().finished.max())
    assert ends[0] == pytest.approx(ends[1], rel=1e-9)


def test_the_gaps_are_the_tokens():
    recorder = Recorder()
    replay(engines(1, recorder)[0], workload(50, 4))
    result = recorder.result()
    assert result.gap_counts.sum() == (result.answer - 1).sum()
    assert (result.gaps * result.gap_counts).sum() == (result.finished - result.first_token).sum()
    assert result.gap(100) == result.gaps.max() >= result.gap(50) >= result.gap(0) == result.gaps.min()


def test_goodput_rises_with_what_is_allowed():
    recorder = Recorder()
    replay(engines(1, recorder)[0], workload(100, 5))
    shares = [recorder.result().attainment(first_token=ms * 1e6, per_token=ms * 1e5) for ms in (10, 100, 300, 1000, 10_000)]
    assert shares == sorted(shares)
    assert shares[0] < shares[-1]


def test_what_comes_too_late_in_the_list_is_refused():
    late = list(islice(workload(5, 1), 5))[::-1]
    with pytest.raises(InputError, match="sort the workload"):
        Cluster(engines(1, None), routing.get("round-robin")).run(late)


def test_a_cluster_has_replicas():
    with pytest.raises(InputError, match="at least one"):
        Cluster([], routing.get("round-robin"))
