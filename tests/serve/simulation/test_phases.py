"""Prefill and decode workers as they are asked for: the link that a layout has, pairs that are alone with each other, phases by themselves."""

import numpy as np
import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.phases import Phases, transfer_link
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import fixed, poisson, published, requests
from armillary.serve.workload.requests import arrivals
from armillary.sim.costs import Decoding, Linear

PLACE, MODEL = cluster("dgx-h100:2"), architecture("llama-2-7b")
CONFIG = EngineConfig(kv_dtype="fp16", max_queue=10**6, max_batch_tokens=2048)
COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))


def deployment(tensor=1, pipeline=1, precision=Precision()):  # noqa: B008 (frozen)
    return Deployment(MODEL, PLACE, Layout(tensor_parallel=tensor, pipeline_parallel=pipeline), precision)


def phases(prefill=1, decode=1, paired=False, cost=COST):
    one = deployment()
    sides = [Scenario(one, CONFIG, count, cost=cost) for count in (prefill, decode)]
    return Phases(*sides, transfer_link(PLACE, one, one, near=True), paired)


def workload(count=120, rate=12.0, lengths=None):
    return requests(arrivals(poisson(rate, 1), lengths or published("conversation"), count, 2, limit=4000))


def test_every_device_of_the_smaller_engine_moves_its_share():
    near = transfer_link(PLACE, deployment(4), deployment(2, 2), near=True)
    assert near.bandwidth == 4 * PLACE.domain_link.bandwidth
    assert transfer_link(PLACE, deployment(8), deployment(2), near=True).bandwidth == 2 * PLACE.domain_link.bandwidth
    far = transfer_link(PLACE, deployment(2), deployment(2), near=False)
    assert far.bandwidth == 2 * PLACE.network_per_device
    with pytest.raises(InputError, match="no network for keys and values"):
        transfer_link(cluster("h100"), deployment(), deployment(), near=False)


def test_prompts_that_look_alike_are_each_computed_and_moved_whole():
    one = phases()
    assert one.token_bytes == 2 * 32 * 4096 * 2  # keys and values, layers, width, bytes
    run = one.run(workload())
    assert run.stats.prompt_tokens == run.result.prompt.sum()
    assert run.stats.delivered_tokens == run.result.prompt[run.result.answer > 1].sum()
    assert not run.result.reused.any()


def test_a_phase_alone_is_that_phase_when_the_other_takes_no_time():
    """Prompts do not notice who decodes; answers whose prompts and moves cost (almost) nothing are those of the decode phase by itself."""
    alone = Scenario(deployment(), CONFIG, cost=COST, phase="prefill").run(workload())
    both = phases().run(workload())
    order = [np.argsort(one.result.arrival, kind="stable") for one in (alone, both)]
    assert (alone.result.first_token[order[0]] == both.result.first_token[order[1]]).all()
    free = Linear("prompts for nothing", 0, 0, 0, COST.small)
    lone = Scenario(deployment(), CONFIG, cost=free, phase="decode").run(workload(lengths=fixed(8, 40)))
    quick = phases(cost=free).run(workload(lengths=fixed(8, 40)))
    order = [np.argsort(one.result.arrival, kind="stable") for one in (lone, quick)]
    spans = [(one.result.finished - one.result.arrival)[by] for one, by in zip((lone, quick), order, strict=True)]
    assert spans[1].mean() == pytest.approx(spans[0].mean(), rel=0.02)


def test_twice_the_time_for_everything_is_half_the_rate():
    slow = Linear("twice", 2 * COST.fixed, 2 * COST.per_token, 2 * COST.per_pair, Decoding(2 * 9.1e6, 2 * 50.7, 2 * 65e3))
    quick, late = phases(2, 2).run(workload(rate=12.0)).result, phases(2, 2, cost=slow).run(workload(rate=6.0)).result
    for limits in ((400e6, 20e6), (200e6, 15e6)):
        assert late.attainment(*(2 * limit for limit in limits)) == pytest.approx(quick.attainment(*limits), abs=0.01)


def test_pairs_keep_to_themselves(monkeypatch):
    seen = []
    from armillary.serve.simulation import phases as module

    def noted(*arguments, **options):
        seen.append(made := disaggregated(*arguments, **options))
        return made

    disaggregated = module.Disaggregated
    monkeypatch.setattr(module, "Disaggregated", noted)
    phases(3, 3, paired=True).run(workload(rate=30.0))
    assert {(one.source, one.target) for one in seen[0].moved} == {(0, 0), (1, 1), (2, 2)}
    with pytest.raises(InputError, match="no pairs"):
        phases(2, 3, paired=True)


def test_phases_are_of_one_model():
    one = Scenario(deployment(), CONFIG, cost=COST)
    other = Scenario(deployment(precision=Precision(kv="int8")), CONFIG, cost=COST)
    with pytest.raises(InputError, match="in fp16 cannot be those of llama-2-7b in int8"):
        Phases(one, other, transfer_link(PLACE, one.deployment, one.deployment, near=True))
