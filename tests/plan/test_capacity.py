"""Capacity is what queueing theory says, never falls when the objective is loosened, and is not fooled by a queue that has only begun to grow."""

import itertools
from math import exp, factorial, floor

import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.plan.capacity import capacity, probe
from armillary.plan.demand import Demand
from armillary.plan.objective import Objective, parse
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import fixed, published
from armillary.sim.costs import Decoding, Linear

MS = 1_000_000
DEPLOYMENT = Deployment(find("llama-2-7b"), cluster("h100"), Layout(), Precision())
SERVICE = 10 * MS


def server(replicas=1):
    """Every request is one iteration of 10 ms, one after another."""
    cost = Linear("10 ms", SERVICE, 0, 0, Decoding(SERVICE, 0, 0))
    return Scenario(DEPLOYMENT, EngineConfig(max_running=1, max_queue=1_000_000), replicas, cost=cost)


def engine():
    cost = Linear("a line", 5e6, 20e3, 0, Decoding(5e6, 1, 100e3))
    return Scenario(DEPLOYMENT, EngineConfig(max_running=16, max_queue=1_000_000), cost=cost)


def waits_at_most(multiple, load):
    """The share of M/D/1's requests that wait at most `multiple` services (Erlang 1909; Crommelin 1932)."""
    terms = [
        exp(load * (multiple - k)) * (-load * (multiple - k)) ** k / factorial(k) for k in range(floor(multiple) + 1)
    ]  # fmt: skip
    return (1 - load) * sum(terms)


@pytest.mark.parametrize("bounds", [{"first_token": 15 * MS}, {"wait": 25 * MS}, {"per_token": MS}])
def test_evenly_spaced_requests_fill_the_server(bounds):
    """Up to 1 / D nobody waits, above it the queue grows for ever, whatever is bounded: even where nothing bounds the wait."""
    found = capacity(server(), Demand(fixed(10, 1), variation=1e-3), Objective(**bounds, attainment=0.95), tolerance=0.04)
    assert found.rate == pytest.approx(100, rel=0.045)


@pytest.mark.parametrize(("multiple", "share"), [(2.5, 0.9), (1.5, 0.6)])
def test_poisson_requests_are_an_md1_queue(multiple, share):
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if waits_at_most(multiple, middle) >= share else (low, middle)
    found = capacity(server(), Demand(fixed(10, 1)), Objective(wait=round(multiple * SERVICE), attainment=share))
    assert found.rate == pytest.approx(100 * low, rel=0.06)


def test_looser_objectives_hold_at_no_lower_rates():
    demand, rates = Demand(fixed(40, 3)), []
    for first, token, share in [(40, 7.5, 0.99), (40, 7.5, 0.9), (40, 9, 0.9), (80, 9, 0.5)]:
        rates.append(capacity(engine(), demand, Objective(first * MS, round(token * MS), None, share), tolerance=0.1).rate)
    assert all(later >= before * 0.9 for before, later in itertools.pairwise(rates))
    assert rates[0] < rates[-1]


def test_a_long_queue_looks_short_at_first():
    """At 1.05 of what it serves a server's first 256 requests wait less than a second; it must not hold for that."""
    demand, objective = Demand(fixed(10, 1), variation=1e-3), Objective(wait=1000 * MS)
    alike = probe(server(), demand, objective, 98)
    assert alike.holds
    assert alike.attainment == 1
    over = probe(server(), demand, objective, 105)
    assert not over.holds
    assert over.requests > 256


def test_more_replicas_serve_as_much_more():
    demand, objective = Demand(fixed(10, 1)), Objective(wait=60 * MS)
    one, four = (capacity(server(replicas), demand, objective, tolerance=0.2).rate for replicas in (1, 4))
    assert four > 3.2 * one


def test_same_seed_same_answer_and_what_is_not_wanted_is_not_sought():
    demand, objective = Demand(fixed(40, 3), seed=7), Objective(first_token=60 * MS)
    found = capacity(engine(), demand, objective, tolerance=0.2)
    assert capacity(engine(), demand, objective, tolerance=0.2) == found
    beaten = capacity(engine(), demand, objective, tolerance=0.2, enough=found.rate * 2)
    assert (beaten.rate, len(beaten.probes)) == (0.0, 1)
    assert capacity(engine(), demand, objective, tolerance=0.2, enough=found.rate / 1.9).rate == pytest.approx(found.rate, rel=0.2)


def test_what_no_request_alone_keeps_has_no_capacity():
    found = capacity(engine(), Demand(fixed(100, 20)), Objective(first_token=6 * MS, per_token=50 * MS))
    assert (found.rate, found.probes) == (0.0, ())
    assert found.alone.each == {"ttft": 0.0, "tpot": 1.0}
    assert found.alone.first_token == (7 * MS, 7 * MS, 7 * MS)


def test_rates_differ_by_nothing_but_the_rate():
    demand = Demand(published("conversation"))
    slow, fast = (list(demand.requests(rate, 50, 4096)) for rate in (1, 4))
    assert [(len(one.prompt), one.sampling.max_tokens) for one in slow] == [(len(one.prompt), one.sampling.max_tokens) for one in fast]
    assert all(abs(one.arrival - 4 * other.arrival) <= 4 for one, other in zip(slow, fast, strict=True))


def test_objectives_are_read():
    assert parse("ttft=300ms, tpot=50ms") == Objective(300 * MS, 50 * MS, None, 0.9)
    assert parse("wait=5s,attainment=0.99") == Objective(wait=5000 * MS, attainment=0.99)
    assert str(parse("ttft=300ms,tpot=50ms")) == "ttft 300 ms, tpot 50 ms for 0.9 of the requests"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no part of an objective"), ("ttft", "no part"), ("ttfb=3ms", "ttft=300ms"), ("ttft=300", "is not a duration"),
        ("ttft=0ms", "impossible"), ("ttft=1s,ttft=2s", "twice"), ("attainment=0.9", "without bounds"),
        ("ttft=1s,attainment=0", "no share"), ("ttft=1s,attainment=nan", "no share"), ("ttft=1s,attainment=x", "no number"),
    ],
)  # fmt: skip
def test_objectives_that_are_none(text, says):
    with pytest.raises(InputError, match=says):
        parse(text)
