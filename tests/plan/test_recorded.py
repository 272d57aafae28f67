"""A recorded trace as a demand: always the same requests, faster or slower, judged by all of them."""

from itertools import pairwise

import numpy as np
import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.plan.capacity import capacity, probe
from armillary.plan.objective import Objective
from armillary.plan.recorded import RecordedDemand
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import bursty, published
from armillary.serve.workload.requests import arrivals
from armillary.sim.costs import Decoding, Linear

MS = 1_000_000
DEPLOYMENT = Deployment(find("llama-2-7b"), cluster("h100"), Layout(), Precision())


def server():
    """Every request is one iteration of 10 ms, one after another."""
    cost = Linear("10 ms", 10 * MS, 0, 0, Decoding(10 * MS, 0, 0))
    return Scenario(DEPLOYMENT, EngineConfig(max_running=1, max_queue=1_000_000), cost=cost)


def engine():
    cost = Linear("a line", 5e6, 20e3, 0, Decoding(5e6, 1, 100e3))
    return Scenario(DEPLOYMENT, EngineConfig(max_running=16, max_queue=1_000_000), cost=cost)


def written(path, rows):
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + "".join(f"{a},{p},{d}\n" for a, p, d in rows))
    return path


@pytest.fixture
def bursts(tmp_path):
    came = arrivals(bursty(2.0, 3.0, 1), published("code"), 300, 1, limit=4000)
    return written(tmp_path / "trace.csv", [(one.at / 1e9, one.prompt, one.answer) for one in came])


def test_the_same_requests_at_every_rate(bursts):
    demand = RecordedDemand.read(bursts)
    slow, fast = (list(demand.requests(demand.rate * speed, 300, 4096)) for speed in (1, 4))
    assert [(len(one.prompt), one.sampling.max_tokens) for one in slow] == [(len(one.prompt), one.sampling.max_tokens) for one in fast]
    assert all(abs(one.arrival - 4 * other.arrival) <= 4 for one, other in zip(slow, fast, strict=True))
    assert [one.arrival for one in slow] == [one.at for one in demand.rows]


def test_a_rate_is_judged_by_all_of_the_trace(bursts):
    """What the probe says is what a simulation of the trace says, request by request."""
    demand, objective = RecordedDemand.read(bursts), Objective(first_token=100 * MS, attainment=0.9)
    for speed in (1, 4):
        seen = probe(engine(), demand, objective, demand.rate * speed)
        result = engine().run(demand.requests(demand.rate * speed, 300, 4096)).result
        assert (seen.requests, seen.attainment) == (300, objective.met(result))
        assert seen.holds == (seen.attainment >= 0.9)


def test_the_capacity_of_an_even_trace_is_the_servers(tmp_path):
    """10 ms each, evenly spaced: nobody waits up to 100 a second, and above it the last of n waits n (10 ms - gap)."""
    demand = RecordedDemand.read(written(tmp_path / "even.csv", [(place, 10, 1) for place in range(200)]))
    assert (demand.rate, demand.variation) == (1, 0)
    found = capacity(server(), demand, Objective(first_token=11 * MS, attainment=1.0), tolerance=0.01)
    assert found.rate == pytest.approx(1 / (10e-3 - 1e-3 / 199), rel=0.011)


def test_bounds_count_what_is_not_shared(tmp_path):
    path = tmp_path / "shared.jsonl"
    path.write_text(
        "".join(f'{{"timestamp": {at}, "input_length": 1000, "output_length": 5, "hash_ids": [0, {at}]}}\n' for at in (1, 2, 3))
    )
    demand = RecordedDemand.read(path)
    assert demand.moments(4096).prompt == np.mean([1000, 488, 488])
    assert (demand.prompt_at(0.5, 4096), demand.longest(4096)) == (488, 1005)


def test_what_exceeds_the_context_is_refused_or_cut(bursts):
    with pytest.raises(InputError, match=r"request [0-9]+ of trace.csv has .* the context is 1,000: give --cut"):
        RecordedDemand.read(bursts).longest(1000)
    cut = RecordedDemand.read(bursts, cut=True)
    assert cut.longest(1000) == 1000
    assert all(len(one.prompt) + one.sampling.max_tokens <= 1000 for one in cut.requests(1.0, 300, 1000))


def test_looser_objectives_hold_at_no_lower_speeds(bursts):
    demand = RecordedDemand.read(bursts, most=80)
    rates = [capacity(engine(), demand, Objective(first_token=ms * MS, attainment=0.9), tolerance=0.3).rate for ms in (150, 600)]
    assert all(before <= later for before, later in pairwise(rates))


def test_what_has_no_rate_is_refused(tmp_path):
    with pytest.raises(InputError, match="no time between"):
        RecordedDemand.read(written(tmp_path / "burst.csv", [(1, 10, 1), (1, 10, 1)]))
