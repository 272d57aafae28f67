"""Bounds that no simulation beats, a search that loses nothing by pruning, and errors that say what is missing."""

import dataclasses
import math

import pytest

from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.models.graph.find import find
from armillary.plan.bounds import alone, ceiling
from armillary.plan.candidates import REASONS, Candidate, Pruned, Space, candidates
from armillary.plan.capacity import capacity
from armillary.plan.choice import choose, together
from armillary.plan.demand import Demand
from armillary.plan.objective import parse
from armillary.plan.search import as_good, score, search
from armillary.serve.config import EngineConfig
from armillary.serve.workload import fixed

ENGINE = EngineConfig(kv_dtype="fp16", max_queue=1_000_000)
DEMAND = Demand(fixed(600, 4))
OBJECTIVE = parse("ttft=400ms,tpot=40ms")
SPACE = Space(("a100", "h100-pcie"), tensor=(1, 2), pipeline=(1,), policies=("sarathi", "orca"), budgets=(512,), running=(8,))


def tried(space=SPACE, model="llama-2-7b"):
    return list(candidates(find(model), space, ENGINE))


@pytest.fixture(scope="module")
def measured():
    """Every candidate's capacity, without any pruning."""
    possible = [one for one in tried() if isinstance(one, Candidate)]
    return [(one, capacity(one.scenario, DEMAND, OBJECTIVE, tolerance=0.2)) for one in possible]


def test_nothing_serves_more_than_its_ceiling_nor_faster_than_alone(measured):
    moments = DEMAND.moments(4096)
    assert len(measured) >= 4
    for candidate, found in measured:
        bound = ceiling(candidate, moments)
        assert found.rate <= bound.rate * 1.2, candidate.name  # waits may grow by the tolerance
        least = alone(candidate, DEMAND, OBJECTIVE)
        for probe in (found.alone, *found.probes):
            assert least.first_token <= probe.first_token[0] * 1.000001
            assert least.per_token <= probe.per_token[0] * 1.000001


@pytest.mark.parametrize(("rate", "rank"), [(None, "devices"), (30.0, "devices"), (7.0, "dollars")])
def test_pruning_changes_nothing(measured, rate, rank):
    def score(candidate, found):
        unit = candidate.devices if rank == "devices" else candidate.price
        each = min(found.rate, ceiling(candidate, DEMAND.moments(4096)).rate)
        whole = unit / each if rate is None else unit * -(-rate // each)
        return whole, unit / each

    priced = [(one, found) for one, found in measured if found.rate and (rank == "devices" or one.price is not None)]
    best = min(score(one, found) for one, found in priced)
    found = search(tried(), DEMAND, OBJECTIVE, rate=rate, rank=rank, keep=1, tolerance=0.2)
    option = found.options[0]
    assert score(option.candidate, option.capacity)[0] == pytest.approx(best[0], rel=0.2)
    assert len(found.options) == 1
    assert sum(one.count for one in found.pruned) == SPACE.size - 1
    assert {one.reason for one in found.pruned} <= set(REASONS)


def test_replicas_behind_a_router_keep_the_objective():
    found = search(tried(), DEMAND, OBJECTIVE, rate=20.0, rank="devices", keep=2, tolerance=0.2)
    option = found.options[0]
    chosen = together(option, DEMAND, OBJECTIVE, 20.0)
    assert chosen.counts[0] >= option.replicas(20.0) >= 20 / option.ceiling.rate
    assert chosen.simulated.replicas == chosen.counts[0]
    assert chosen.seen.holds
    assert chosen.seen.rate == 20.0
    best, again = choose(found, DEMAND, OBJECTIVE, 20.0, "power-of-two")
    assert best.score(20.0) <= chosen.score(20.0)
    assert again.options[0] is best.option


def test_a_node_is_paid_whole_and_devices_one_by_one():
    """One replica of two devices takes a node of eight where that is what is rented; four of them take no more."""
    space = dataclasses.replace(SPACE, clusters=("dgx-h100",), tensor=(2,), policies=("sarathi",))
    (candidate,) = tried(space)
    each = candidate.deployment.device.price
    assert candidate.price == pytest.approx(2 * each)
    for rate, packages in ((1.0, 1), (20.0, 1), (20.1, 2)):  # of replicas that serve five requests a second each
        assert score(candidate.rent, candidate.devices, 5.0, rate)[0] == pytest.approx(8 * each * packages)
    (bare,) = tried(dataclasses.replace(space, clusters=("h100",)))
    for rate, replicas in ((1.0, 1), (20.0, 4), (20.1, 5)):
        assert score(bare.rent, bare.devices, 5.0, rate)[0] == pytest.approx(2 * each * replicas)
    assert as_good((16 * each, 1.0), candidate.rent, 2, 20.0) == 20.0 / 8
    assert as_good((16 * each, 1.0), bare.rent, 2, 20.0) == 20.0 / 8
    assert as_good((7 * each, 1.0), candidate.rent, 2, 20.0) == math.inf


def test_what_is_impossible_says_what_would_do():
    with pytest.raises(CapacityError, match=r"fits none .* GB more .* at least \d+ such devices"):
        search(tried(Space(("t4",), tensor=(1, 2)), "llama-2-70b"), DEMAND, OBJECTIVE)
    with pytest.raises(InputError, match=r"ttft is .* at best .*, 1 ms is asked for.* allow ttft="):
        search(tried(), DEMAND, parse("ttft=1ms"))
    with pytest.raises(InputError, match="is no rate"):
        search(tried(), DEMAND, OBJECTIVE, rate=0.0)
    with pytest.raises(NotFoundError, match="did you mean h100"):
        tried(Space(("h1000",)))
    with pytest.raises(InputError, match=r"3 does not divide|attention heads"):
        search(tried(Space(("a100",), tensor=(3,))), DEMAND, OBJECTIVE)


def test_every_candidate_is_told_of():
    seen = tried(Space(("a100",), tensor=(1, 3), pipeline=(1,), budgets=(256, 512), policies=("vllm",), running=(8,)), "llama-2-7b")
    assert sum(one.count if isinstance(one, Pruned) else 1 for one in seen) == 4
    assert {type(one) for one in seen} == {Candidate, Pruned}


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"budgets": ()}, "no budgets"), ({"tensor": (1, 1)}, "once"), ({"budgets": tuple(range(1, 3000))}, "at most 4,096")],
)
def test_spaces_that_are_none(wrong, says):
    with pytest.raises(InputError, match=says):
        Space(("h100",), **wrong)
