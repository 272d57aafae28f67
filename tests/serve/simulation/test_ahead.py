"""Schedules made ahead in virtual time: those of the real engine's asynchronous scheduling, and a host that the device hides."""

import random

import pytest

from armillary.core.clock import VirtualClock
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.comparison import schedules
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.sim.batch import Batch
from armillary.sim.costs import Decoding, Linear
from armillary.sim.costs.fitted import Host
from armillary.sim.costs.overlapped import Overlapped

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))


def asked(seed=0, count=40):
    generator, now, requests = random.Random(seed), 0, []
    for number in range(count):
        now += generator.choice((0, 5_000_000, 60_000_000, 400_000_000))
        sampling = SamplingParams(generator.randint(1, 30), ignore_eos=True)
        requests.append(Request(f"r{number}", (7,) * generator.randint(1, 90), sampling, arrival=now))
    return requests


@pytest.mark.parametrize("policy", ["sarathi", "vllm", "orca", "request-level"])
@pytest.mark.parametrize("order", ["fcfs", "sjf"])
def test_they_are_the_real_engines(policy, order):
    """The engine itself, whose executor runs on a thread of its own while the next schedule is made, on the same virtual clock."""
    found = []
    for virtual in (False, True):
        config = EngineConfig(
            policy=policy, order=order, max_wait=None, kv_blocks=40, block_size=4, max_running=6, max_batch_tokens=64, async_scheduling="on"
        )  # fmt: skip
        trace, clock, requests = Trace(), VirtualClock(), asked()
        executor = VirtualExecutor(clock, COST)
        if virtual:
            engine = VirtualEngine(executor, config, trace=trace)
            replay(engine, requests)
        else:
            engine = Engine(executor, config, clock=clock, trace=trace)
            coming = list(requests)
            while True:
                while coming and coming[0].arrival <= clock.now():
                    engine.submit(coming.pop(0))
                if not engine.step():
                    if not coming:
                        break
                    clock.advance_to(coming[0].arrival)
            engine.stop()
        found.append((schedules(trace), engine.stats, [(one.first_token, one.finished) for one in requests]))
    assert found[0] == found[1]
    assert found[0][1].foreseen_schedules > 0


@pytest.mark.parametrize(("host", "each"), [(2e6, 5_000_000), (5e6, 5_000_000), (8e6, 8_000_000)])
def test_the_longer_of_host_and_device_counts(host, each):
    """But for the first iteration, for which nobody made a schedule ahead."""
    cost = Overlapped(Linear("flat", 5e6, 0, 0, Decoding(5e6, 0, 0)), Host(host))
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), cost), EngineConfig(kv_blocks=64, async_scheduling="on"))
    alone = Request("alone", (7,) * 100, SamplingParams(51, ignore_eos=True), arrival=0)
    replay(engine, [alone])
    assert (alone.first_token, alone.finished) == (5_000_000 + host, 5_000_000 + host + 50 * each)
    assert engine.stats.foreseen_schedules == 50


def test_one_after_the_other_without_it():
    cost = Overlapped(COST, Host(1e6, 1e3, 1e4))
    assert cost.iteration(Batch(((10, 0),), 2, 50, 3)) == COST.iteration(Batch(((10, 0),), 2, 50, 3)) + 1_013_000
    assert cost.decodes(3, 60, 4).tolist() == [cost.iteration(Batch((), 3, 60 + 3 * i, 3)) for i in range(4)]
