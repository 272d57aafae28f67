"""Leaping over iterations that repeat changes nothing that anybody can see; virtual time obeys the laws of queues."""

import zlib
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.sim.costs import Decoding, Linear

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3), Decoding(5e6, 50.7, 99e3), switch=4)
ARRIVALS = st.lists(
    st.tuples(st.integers(0, 300_000_000), st.integers(1, 90), st.integers(0, 60), st.integers(0, 2)), min_size=1, max_size=12
)


def blank(known, maximum, arrival, number=0, **more):
    sampling = SamplingParams(max_tokens=maximum, ignore_eos=True)
    return Request(f"r{number}", (7,) * known, sampling, arrival=arrival, **more)


def crc(request, position):
    return zlib.crc32(f"{request.cache_salt} {position}".encode()) % 3


def seen(result):
    gaps = Counter()
    for ns, count in zip(result.gaps.tolist(), result.gap_counts.tolist(), strict=True):
        gaps[ns] += count
    return {name: getattr(result, name).tolist() for name in ("arrival", "finished", "answer")}, gaps


def simulated(arrivals, fast, config, drawn=None, order="fcfs"):
    trace, recorder = Trace(), Recorder()
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), COST, drawn), config, trace=trace, fast_forward=fast, recorder=recorder)
    requests, now = [], 0
    for number, (gap, known, maximum, salt) in enumerate(arrivals):
        now += gap
        requests.append(blank(known, maximum, now, number, cache_salt=str(salt), priority=salt if order == "priority" else 0))
    replay(engine, requests)
    times = [
        (one.first_scheduled, one.first_token, one.last_token, one.finished, one.output, one.preemptions, one.reused) for one in requests
    ]
    words = [engine.explain(one.id) for one in requests]
    return trace.spans(), trace.counters(), times, words, engine.stats, engine._times.recent(), seen(recorder.result()), engine.clock.now()


# Two that say the same share each block as soon as it is full, so that the third fits before either ends.
SHARING = {
    "arrivals": [(0, 77, 20, 0), (0, 77, 45, 0), (0, 88, 5, 0)], "policy": "orca", "order": "fcfs", "bound": None, "target": None,
    "blocks": 152, "size": 1, "prefixes": "on", "seats": 6, "drawn": None,
}  # fmt: skip


@settings(max_examples=40)
@example(**SHARING)
@given(
    arrivals=ARRIVALS,
    policy=st.sampled_from(["sarathi", "vllm", "orca", "request-level"]),
    order=st.sampled_from(["fcfs", "fcfs", "sjf", "priority"]),
    bound=st.sampled_from([None, "50ms"]),
    target=st.sampled_from([None, "12ms"]),
    blocks=st.integers(40, 120),
    size=st.sampled_from([1, 4, 16]),
    prefixes=st.sampled_from(["on", "off"]),
    seats=st.integers(1, 6),
    drawn=st.sampled_from([None, crc]),
)
def test_a_leap_is_many_steps(arrivals, policy, order, bound, target, blocks, size, prefixes, seats, drawn):
    config = EngineConfig(
        policy=policy, order=order, max_wait=bound, tbt_target=target if policy == "sarathi" else None, kv_blocks=max(blocks, -(-150 // size)),
        block_size=size, prefix_cache=prefixes, max_running=seats, max_batch_tokens=32,
    )  # fmt: skip
    stepped, leapt = (simulated(arrivals, fast, config, drawn, order) for fast in (False, True))
    for one, other in zip(stepped, leapt, strict=True):
        assert one == other


def test_whole_answers_are_one_leap():
    config = EngineConfig(kv_blocks=64)
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), COST), config)
    engine.submit(blank(10, 100, 0))
    assert engine.step()  # the prompt
    leap = engine.begin()
    assert len(leap.ends) == 99
    engine.end(leap)
    assert not engine.step()
    assert engine.stats.iterations == 100


def test_one_request_alone_takes_what_its_iterations_cost():
    """Vidur's golden: without a queue the first token comes after the prompt's iteration, each next one after a decode's."""
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), Linear("flat", 3e6, 0, 0, Decoding(1e6, 0, 0))), EngineConfig(kv_blocks=64))
    alone = blank(100, 51, 5_000_000)
    replay(engine, [alone])
    assert (alone.first_token, alone.finished) == (8_000_000, 58_000_000)


def test_what_comes_too_late_in_the_list_is_refused():
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), COST), EngineConfig(kv_blocks=64))
    with pytest.raises(InputError, match="sort the workload"):
        replay(engine, [blank(3, 3, 9, 0), blank(3, 3, 8, 1)])
