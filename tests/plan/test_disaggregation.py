"""DistServe's two algorithms: what they find is what trying everything finds, and nothing beats its bounds."""

import dataclasses
import itertools

import pytest

from armillary.core.errors import InputError
from armillary.models.graph.find import find as model
from armillary.plan.arithmetic import arithmetic
from armillary.plan.candidates import REASONS, Space, candidates
from armillary.plan.capacity import capacity
from armillary.plan.choice import choose, find
from armillary.plan.demand import Demand
from armillary.plan.disaggregation import Apart, disaggregate, instances, joined, of_phase
from armillary.plan.file import chosen, load
from armillary.plan.objective import parse
from armillary.plan.rent import DEVICES
from armillary.plan.search import needed
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.phases import transfer_link
from armillary.serve.workload import fixed

ENGINE = EngineConfig(kv_dtype="fp16", max_queue=1_000_000)
DEMAND = Demand(fixed(900, 6))
OBJECTIVE = parse("ttft=150ms,tpot=16ms")
SPACE = Space(("dgx-h100",), tensor=(1, 2), pipeline=(1,), policies=("sarathi",), budgets=(1024,), running=(16,))
TOLERANCE = 0.4


def tried(space=SPACE):
    return list(candidates(model("llama-2-7b"), space, ENGINE))


@pytest.fixture(scope="module")
def moments():
    return DEMAND.moments(4096)


@pytest.fixture(scope="module")
def phases(moments):
    """Both phases of every layout, each with its capacity by itself."""

    def of(phase):
        objective, found = of_phase(OBJECTIVE, phase), []
        for one in tried():
            own = dataclasses.replace(one, scenario=dataclasses.replace(one.scenario, phase=phase))
            found.append((own, capacity(own.scenario, DEMAND, objective, tolerance=TOLERANCE).rate))
        return found

    return of("prefill"), of("decode")


@pytest.fixture(scope="module")
def pairs(phases):
    """Every pair that a node holds, with what it sustains."""
    found = []
    for (prefill, first), (decode, second) in itertools.product(*phases):
        link = transfer_link(prefill.deployment.cluster, prefill.deployment, decode.deployment, near=True)
        one, bound = joined(prefill, decode, link, paired=True), min(first, second)
        found.append((one, capacity(one, DEMAND, OBJECTIVE, tolerance=TOLERANCE, enough=bound / 2.5, most=1.6 * bound).rate))
    return found


def test_each_phase_is_the_best_of_all_by_itself(phases, moments):
    for phase, every in zip(("prefill", "decode"), phases, strict=True):
        best = max(rate / one.devices for one, rate in every)
        found, _ = instances(tried(), phase, DEMAND, OBJECTIVE, moments, "devices", TOLERANCE)
        assert found[0].rate / found[0].candidate.devices == pytest.approx(best, rel=TOLERANCE)
        for one in found:
            rate = next(rate for own, rate in every if own.devices == one.candidate.devices)
            assert rate <= min(one.bound * (1 + TOLERANCE), one.ceiling.rate * (1 + TOLERANCE))


def test_both_algorithms_find_what_trying_everything_finds(phases, pairs, moments):
    found, pruned = disaggregate(tried(), DEMAND, OBJECTIVE, moments, rank="devices", tolerance=TOLERANCE)
    first = next(one for one in found if one.algorithm == 1)
    best = sum(min(one.devices / rate for one, rate in every) for every in phases)
    assert first.score(None)[1] == pytest.approx(best, rel=TOLERANCE)
    assert first.link.name == "ib-ndr"
    second = next(one for one in found if one.algorithm == 2)
    assert second.pair / sum(size for _, size in second.groups((1, 1))) == pytest.approx(
        max(rate / one.devices for one, rate in pairs), rel=TOLERANCE
    )
    assert "nvlink" in second.link.name
    assert {one.reason for one in pruned} <= set(REASONS)


def test_a_pair_serves_no_more_than_either_of_its_phases(phases, pairs):
    each = [{one.devices: rate for one, rate in every} for every in phases]
    for one, rate in pairs:
        prefill, decode = one.prefill.deployment.layout.devices, one.decode.deployment.layout.devices
        assert rate <= min(each[0][prefill], each[1][decode]) * (1 + TOLERANCE)


def test_looser_objectives_hold_at_no_lower_rates(pairs):
    one, loose = pairs[0]
    tight = capacity(one, DEMAND, parse("ttft=60ms,tpot=9ms"), tolerance=TOLERANCE, enough=loose / 8, most=loose * 2).rate
    assert 0 < tight < loose


def test_twice_the_engines_serve_twice_the_rate(pairs):
    one, rate = pairs[0]
    two = capacity(one.times(2, 2), DEMAND, OBJECTIVE, tolerance=TOLERANCE, enough=1.6 * rate, most=2.5 * rate)
    assert 1.6 * rate <= two.rate <= 2.5 * rate


def test_a_plan_has_as_many_of_each_as_the_rate_takes(tmp_path, moments):
    rate = 90.0
    found = find(tried(), DEMAND, OBJECTIVE, apart="always", rate=rate, rank="devices", tolerance=TOLERANCE)
    best, found = choose(found, DEMAND, OBJECTIVE, rate, "power-of-two")
    option = best.option
    assert isinstance(option, Apart)
    assert best.seen.holds
    if option.algorithm == 1:
        assert option.counts(rate) == (needed(rate, option.prefill.rate), needed(rate, option.decode.rate))
    assert all(there >= least for there, least in zip(best.counts, option.counts(rate), strict=True))
    assert best.devices == DEVICES.cost(*option.groups(best.counts))
    plan = chosen("llama-2-7b", best, found, DEMAND, OBJECTIVE, rate, "power-of-two", SPACE.size)
    plan.save(tmp_path / "plan.toml")
    assert load(tmp_path / "plan.toml") == plan
    assert (plan.disaggregation.prefill.count, plan.disaggregation.decode.count) == best.counts
    assert plan.disaggregation.bytes_per_second == rate * 900 * 2 * 32 * 4096 * 2
    lines = dict(arithmetic(option, moments, rate))
    assert "900 prompt tokens x 524 kB = 472 MB a request" in lines["keys and values"]
    assert "by capacity alone" in lines["instances"]


def test_what_no_phases_can_be_planned_for():
    one_bound = parse("tpot=16ms")
    with pytest.raises(InputError, match="bounds one phase only"):
        find(tried(), DEMAND, one_bound, apart="always", rate=5.0)
    found = find(tried(), DEMAND, one_bound, rate=5.0, tolerance=TOLERANCE, keep=1)
    assert "phases" in [one.reason for one in found.pruned]
    with pytest.raises(InputError, match="nothing to decode"):
        find(tried(), Demand(fixed(900, 1)), OBJECTIVE, apart="always", rate=5.0)
    alone = Space(("epyc-7742",), tensor=(1,), pipeline=(1,), policies=("sarathi",), budgets=(1024,), running=(16,))
    with pytest.raises(InputError):
        find(tried(alone), DEMAND, parse("ttft=90s,tpot=5s"), apart="always", rate=0.01, rank="devices", tolerance=TOLERANCE)
