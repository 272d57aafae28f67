"""Prefill and decode apart: every request's keys and values move once, are read by nobody before they are there, and wait in bounded memory."""

import itertools

import numpy as np
import pytest

from armillary.cluster.device import Link
from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.disaggregated import Disaggregated, Side
from armillary.serve.workload import fixed, poisson, published, requests
from armillary.serve.workload.requests import arrivals
from armillary.sim.batch import Batch
from armillary.sim.costs import Decoding, Linear

COST = Linear("a line", 9.4e6, 65e3, 50.3, Decoding(9.1e6, 50.7, 65e3))
LINK = Link("slow", "slow", 10e9, 1000)
BYTES = 500_000


def side(count, **options):
    plain = {"kv_blocks": 2000, "max_running": 64, "max_queue": 10**6, "prefix_cache": "off", "policy": "vllm", "max_batch_tokens": 4096}
    return Side(COST, EngineConfig(**{**plain, **options}), count)


def workload(count, rate, seed=0):
    return requests(arrivals(poisson(rate, seed), published("conversation"), count, seed, limit=4000))


def watched(simulation):
    """The requests as the decode engines saw them."""
    seen = []
    for one in simulation._decoded:
        one.ended = lambda request, told=one.ended: (seen.append(request), told(request))
    return seen


@pytest.mark.parametrize("decode", [{}, {"kv_blocks": 300}])
def test_keys_and_values_are_moved_once_and_not_read_before_they_are_there(decode):
    coming = list(workload(150, 12))
    simulation = Disaggregated(side(2), side(2, **decode), LINK, BYTES, 9000)
    seen = watched(simulation)
    result = simulation.run(coming)
    several = {request.id: request for request in coming if request.sampling.max_tokens > 1}
    assert sorted(one.request_id for one in simulation.moved) == sorted(several)
    moved = {one.request_id: one for one in simulation.moved}
    for request in seen:
        assert request.first_scheduled >= moved[request.id].ended
    for request_id, one in moved.items():
        assert one.size == len(several[request_id].prompt) * BYTES
        assert one.begun >= several[request_id].first_token
        assert one.ended - one.begun == LINK.latency + round(one.size * 1e9 / LINK.bandwidth)
    for target in (0, 1):  # a link carries one at a time
        spans = sorted((one.begun, one.ended) for one in simulation.moved if one.target == target)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
        spans = sorted((one.begun, one.ended) for one in simulation.moved if one.source == target)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    assert sorted(result.answer.tolist()) == sorted(request.sampling.max_tokens for request in coming)


def test_what_nobody_has_pulled_is_within_the_buffer():
    coming = list(workload(120, 20))
    simulation = Disaggregated(side(1), side(1, kv_blocks=300), LINK, BYTES, 6000)
    simulation.run(coming)
    moved = {one.request_id: one.ended for one in simulation.moved}
    spans = [(request.first_scheduled, moved[request.id], len(request.prompt)) for request in coming if request.id in moved]
    held = [sum(tokens for begun, ended, tokens in spans if begun <= instant < ended) for instant, _, _ in spans]
    assert 5000 < max(held) <= 6000


def test_a_request_alone_takes_its_prompt_its_move_and_its_decodes():
    simulation = Disaggregated(side(1), side(1), LINK, BYTES, 9000)
    result = simulation.run(requests(arrivals(iter([7]), fixed(1000, 4), 1)))
    first = 7 + COST.iteration(Batch(((1000, 0),), 0, 0, 1))
    moved = first + 1000 + 1000 * BYTES // 10
    decodes = sum(COST.iteration(Batch((), 1, cached, 1)) for cached in (1000, 1001, 1002))
    assert (result.first_token.tolist(), result.finished.tolist()) == ([first], [moved + decodes])


def test_leaps_change_nothing_and_a_seed_gives_the_same_again(monkeypatch):
    found = []
    for fast in (True, True, False):
        simulation = Disaggregated(side(2), side(1, kv_blocks=400), LINK, BYTES, 9000)
        for replica in simulation.decode.replicas:
            if not fast:
                monkeypatch.setattr(replica.engine, "_repeating", None)
        result = simulation.run(workload(60, 10))
        order = np.lexsort((result.prompt, result.arrival))
        found.append([getattr(result, name)[order].tolist() for name in ("first_scheduled", "first_token", "finished", "preemptions")])
    assert found[0] == found[1] == found[2]


def test_what_could_never_run_is_refused():
    too_long = Request("long", (0,) * 5000, SamplingParams(max_tokens=5, ignore_eos=True), arrival=0)
    with pytest.raises(InputError, match="the buffer of a prefill engine"):
        Disaggregated(side(1), side(1), LINK, BYTES, 4000).run([too_long])
    with pytest.raises(InputError, match="need 313 KV blocks"):
        Disaggregated(side(1), side(1, kv_blocks=300), LINK, BYTES, 9000).run([too_long])
    with pytest.raises(InputError, match="at least one of each"):
        Disaggregated(side(0), side(1), LINK, BYTES, 9000)
