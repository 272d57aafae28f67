"""Batches in flight over pipeline stages: one is what it was before, several are as quick as the slowest stage, and queues are DistServe's."""

from dataclasses import replace

import numpy as np
import pytest

from armillary.cluster.cluster import cluster
from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.queueing import first_token_pipelined
from armillary.serve.policies import routing
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.phases import Phases, transfer_link
from armillary.serve.simulation.pipeline import Lane, Pipeline
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import fixed, poisson, published, requests
from armillary.serve.workload.requests import arrivals
from armillary.sim.costs import Decoding, Linear

PLACE = cluster("dgx-a100")
CONFIG = EngineConfig(kv_dtype="fp16", max_queue=10**6, max_batch_tokens=1024)
COLUMNS = ("arrival", "first_scheduled", "first_token", "finished")


def scenario(pipeline=2, **options):
    deployment = Deployment(architecture("llama-2-7b"), PLACE, Layout(pipeline_parallel=pipeline), Precision())
    return Scenario(deployment, CONFIG, **options)


def workload(count, rate, lengths=None):
    return requests(arrivals(poisson(rate, 1), lengths or published("conversation"), count, 2, limit=4000))


class Stage:
    """One as long as another."""

    def ns(self, batch):
        return float(batch.tokens)


def test_batches_alone_take_as_long_as_without_stages_and_others_wait_for_a_stage():
    pipeline = Pipeline(3, 2)
    pipeline.begin(0, 1000, [[10, 25, 7], [10, 26, 8], [1, 2, 3]])
    pipeline.foresee(1001)
    first = pipeline.flights[0]
    assert first.ends == [1042, 1086, 1092]
    pipeline.begin(1, 1003, [[10, 25, 7]])  # waits for the first stage until 1010, and for the slowest until 1035
    pipeline.foresee(1004)
    assert pipeline.flights[1].ends == [1067]
    assert first.ends == [1042, 1052 + 8 + 26 + 8]  # the second stage is taken until 1060; what comes after 1067 is not foreseen
    pipeline.call_off(0, 1050)
    pipeline.foresee(1050)
    assert (len(first.parts), first.ends) == (2, [1042, 1094])
    assert pipeline.end(1) == [1067]
    assert pipeline.busy == 42


@pytest.mark.parametrize("pipeline", [2, 4])
def test_a_leap_of_lanes_is_many_steps(pipeline):
    """Arrivals call off what has not begun, lanes end at different times, blocks run out: every request's times are those of stepping."""
    config = CONFIG.model_copy(update={"kv_blocks": 2400, "max_running": 12})
    found = []
    for fast in (True, False):
        run = replace(scenario(pipeline, replicas=2), config=config, fast_forward=fast).run(workload(50, 6))
        order = np.lexsort((run.result.prompt, run.result.arrival))
        found.append([getattr(run.result, name)[order].tolist() for name in (*COLUMNS, "preemptions")])
        found[-1] += [run.stats.iterations, run.busy, np.sort(run.result.gap_counts).sum()]
    assert found[0] == found[1]


@pytest.mark.parametrize("rate", [2.0, 8.0])
def test_prompts_through_two_stages_wait_as_in_distserves_closed_form(rate):
    """TTFT of an inter-op pipeline: D + R D^2 / (4 (2 - R D)) (Zhong et al., section 3.1)."""
    recorder, pipeline = Recorder(), Pipeline(2, 2)
    cost = Linear("a prompt", 100e6, 0, 0, Decoding(1, 0, 0))
    config = EngineConfig(policy="orca", max_running=1, kv_blocks=64, max_queue=10**6)
    lanes = [Lane(VirtualClock(), cost, pipeline, [Stage(), Stage()]) for _ in (0, 1)]
    engines = [VirtualEngine(lane, config, recorder=recorder, told=False) for lane in lanes]
    Cluster(engines, routing.get("shortest-queue"), lanes=2).run(workload(5000, rate, fixed(8, 1)))
    assert recorder.result().first_tokens.mean() / 1e9 == pytest.approx(first_token_pipelined(0.1, rate), rel=0.03)


def test_full_stages_serve_as_much_as_the_slowest_does():
    coming = fixed(200, 60)
    one, two = (scenario(pipeline_batches=batches).run(workload(300, 1e6, coming)) for batches in (1, 2))
    assert two.result.makespan < one.result.makespan / 1.5
    assert 0.8 * two.result.makespan < two.busy <= two.result.makespan  # of a stage on average
    assert sorted(two.result.answer) == [60] * 300
    again = scenario().run(workload(300, 1e6, coming))
    assert (again.result.finished == two.result.finished).all()


def test_replicas_of_stages_are_one_each_to_the_router():
    four = scenario(pipeline=4, replicas=2, router="round-robin").run(workload(120, 40))
    assert len(four.result.arrival) == 120
    assert four.blocks == scenario(pipeline=4).settled.kv_blocks
    assert four.stats.prompt_tokens == four.result.prompt.sum()


def test_phases_with_stages_move_everything_once():
    first = scenario(2)
    second = scenario(1)
    phases = Phases(first, second, transfer_link(PLACE, first.deployment, second.deployment, near=True), paired=True).times(2, 2)
    run = phases.run(workload(120, 20))
    assert run.stats.delivered_tokens == run.result.prompt[run.result.answer > 1].sum()
    slow = replace(phases, prefill=replace(phases.prefill, pipeline_batches=1)).run(workload(120, 20))
    assert np.median(run.result.first_tokens) <= np.median(slow.result.first_tokens)


def test_what_cannot_be_in_flight():
    with pytest.raises(InputError, match="3 batches are to be in flight over 2"):
        scenario(pipeline_batches=3)
    with pytest.raises(InputError, match="schedules made ahead"):
        replace(scenario(), config=CONFIG.model_copy(update={"async_scheduling": "on"}), pipeline_batches=2)
    with pytest.raises(InputError, match="--pipeline-batches 1"):
        scenario().run(workload(2, 1), trace=Trace("x"))
