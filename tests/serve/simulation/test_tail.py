"""Second copies in virtual time: five in a hundred, never more than the budget, one answer each, and nothing left behind by who lost."""

import numpy as np
import pytest

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.policies import routing
from armillary.serve.policies.routing.hedging import Hedging
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.simulation.tail import Answers, SecondCopies
from armillary.serve.workload import fixed, poisson, published, requests
from armillary.serve.workload.requests import arrivals
from armillary.sim.costs import Decoding, Linear

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))
SLOW = Linear("a tenth as fast", 94e6, 650e3, 503, Decoding(91e6, 507, 650e3))


def simulated(kind, count=4, slow=0, rate=4.0, number=200, budget=0.05, fast=True, lengths=None, seed=0, **options):
    """(columns by arrival, engines, stats)."""
    recorder = Recorder()
    answers = Answers(recorder)
    config = EngineConfig(**{"kv_blocks": 2000, "max_running": 64, "max_queue": 10**6, **options})
    engines = [
        VirtualEngine(
            VirtualExecutor(VirtualClock(), SLOW if index < slow else COST), config, recorder=answers, fast_forward=fast, told=False
        )
        for index in range(count)
    ]
    router = routing.get("round-robin")
    group = Cluster(engines, router) if kind == "none" else SecondCopies(engines, router, answers, kind=kind, hedging=Hedging(budget))
    coming = requests(arrivals(poisson(rate, seed), lengths or published("conversation"), number, seed, limit=4000))
    group.run(coming)
    result = recorder.result()
    order = np.lexsort((result.prompt, result.arrival))
    names = ("arrival", "first_scheduled", "first_token", "finished", "answer", "prompt")
    return {name: getattr(result, name)[order] for name in names}, engines, getattr(group, "stats", None)


def test_one_in_twenty_is_later_than_the_95th_percentile():
    """Requests that are all alike, few at a time, and a budget that stops nothing."""
    _, _, stats = simulated("hedged", count=8, rate=60.0, number=1500, budget=1.0, lengths=fixed(600, 3), max_running=16)
    assert 0.035 < stats.hedges / 1500 < 0.065


@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_no_more_than_the_budget(budget):
    _, _, stats = simulated("hedged", slow=1, rate=3.0, number=150, budget=budget)
    assert 0 < stats.hedged_tokens <= budget * stats.prompt_tokens


@pytest.mark.parametrize("options", [{}, {"kv_blocks": 300}, {"policy": "vllm"}, {"speculate": "off", "prefix_cache": "off"}])
def test_one_answer_each_and_nothing_left_behind(options):
    columns, engines, stats = simulated("hedged", slow=1, rate=3.0, budget=0.5, **options)
    plain, _, _ = simulated("none", slow=1, rate=3.0, **options)
    for name in ("arrival", "answer", "prompt"):
        assert columns[name].tolist() == plain[name].tolist()
    assert stats.won > 0
    assert sum(engine.stats.finished["cancelled"] for engine in engines) <= stats.hedges
    assert sum(engine.stats.finished["cancelled"] + engine.stats.finished["length"] for engine in engines) == 200 + stats.hedges
    for engine in engines:
        assert engine.free_blocks == engine.limits.total_blocks
        assert engine.queued == engine.running == engine.queued_tokens == 0
    waits, before = columns["first_token"] - columns["arrival"], plain["first_token"] - plain["arrival"]
    assert np.percentile(waits, 95) < np.percentile(before, 95)


@pytest.mark.parametrize("kind", ["hedged", "tied"])
def test_leaps_change_nothing_and_a_seed_gives_the_same_again(kind):
    found = [simulated(kind, slow=1, rate=3.0, number=60, budget=0.5, fast=fast, max_running=8) for fast in (True, True, False)]
    first = {name: column.tolist() for name, column in found[0][0].items()}
    for columns, _, stats in found[1:]:
        assert {name: column.tolist() for name, column in columns.items()} == first
        assert stats == found[0][2]
    assert found[0][2].hedges + found[0][2].tied > 0


def test_a_tied_request_runs_once_where_it_can_begin_first():
    options = {"slow": 1, "rate": 3.0, "max_running": 4, "lengths": fixed(300, 40)}
    tied, engines, stats = simulated("tied", **options)
    plain, _, _ = simulated("none", **options)
    assert stats.tied == 200
    assert sum(engine.stats.prompt_tokens for engine in engines) == 200 * 300
    assert (tied["first_scheduled"] - tied["arrival"]).mean() < 0.5 * (plain["first_scheduled"] - plain["arrival"]).mean()
    assert tied["answer"].tolist() == plain["answer"].tolist()


def test_one_replica_has_nobody_to_send_to():
    with pytest.raises(InputError, match="at least 2"):
        simulated("hedged", count=1)
