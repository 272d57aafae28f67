"""KV policies in virtual time: what is read, counted query by query; memory that does not grow; costs that do not either."""

from dataclasses import replace

import pytest
import torch

from armillary.cluster.cluster import cluster
from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.block_memory import BlockMemory
from armillary.kernels.heavy_hitters import Budget
from armillary.kernels.paged_attention import PagedCache, Span
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.kv_policies.reading import Reading, reading
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.acceptance import Acceptance
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.kept import attending, kept
from armillary.serve.simulation.memory import kv_blocks
from armillary.serve.simulation.scenario import Scenario
from armillary.sim.batch import Batch, Read
from armillary.sim.costs import Decoding, Linear

PIECES = [(1, 0), (1, 37), (7, 0), (16, 16), (50, 3), (130, 200), (1, 129), (33, 64), (1, 500), (200, 90)]


def config(policy, **options):
    return EngineConfig(**{"kv_policy": policy, "kv_blocks": 400, "prefix_cache": "off", **options})


def deployment(model="llama-2-7b", tensor=1):
    return Deployment(find(model), cluster("dgx-h100"), Layout(tensor_parallel=tensor), Precision())


@pytest.mark.parametrize(("query", "cached"), PIECES)
@pytest.mark.parametrize(("size", "sinks", "window"), [(16, 4, 40), (4, 9, 13), (1, 0, 8)])
def test_a_rolling_window_query_by_query(query, cached, size, sinks, window):
    kv = config("streaming", block_size=size, kv_sinks=sinks, kv_window=window).kv
    seen = [set(range(sinks)) | set(range(kv.seen.first(p, size), p + 1)) for p in range(cached, cached + query)]
    seen = [{key for key in keys if key <= p} for p, keys in zip(range(cached, cached + query), seen, strict=True)]
    found = reading(kv, query, cached, 128, prompt=query > 1)
    assert found == Reading(sum(map(len, seen)), len(set().union(*seen)))


@pytest.mark.parametrize(("query", "cached"), PIECES)
@pytest.mark.parametrize(("size", "heavy", "recent"), [(16, 20, 30), (4, 8, 9), (8, 100, 60)])
def test_heavy_hitters_query_by_query(query, cached, size, heavy, recent):
    budget = Budget(heavy, recent)
    pairs = sum(
        p + 1 if p < budget.first_eviction(size) else budget.kept(p // size * size, size) + p % size + 1
        for p in range(cached, cached + query)
    )
    found = reading(config("h2o", block_size=size, kv_budget=heavy, kv_window=recent).kv, query, cached, 128, prompt=query > 1)
    keys = budget.kept(cached, size) + query
    assert found == Reading(pairs, keys, 8 * keys)


def test_pages_are_read_by_their_bounds():
    kv = config("quest", kv_budget=64).kv
    assert reading(kv, 1, 63, 128, prompt=False) == Reading(64, 64)
    assert reading(kv, 1, 64, 128, prompt=False) == Reading(49, 49, 5 * 260)
    assert reading(kv, 1, 1023, 128, prompt=False) == Reading(64, 64, 64 * 260)
    assert reading(kv, 100, 50, 128, prompt=True) == Reading(sum(range(51, 151)), 150)
    assert reading(kv, 2, 1022, 128, prompt=False) == Reading(63 + 64, 127, 128 * 260)


def test_long_prompts_by_their_patterns():
    kv = config("minference", kv_sinks=4, kv_window=16, kv_budget=80).kv
    assert reading(kv, 100, 0, 128, prompt=True) == Reading(5050, 100)
    whole = sum(min(p + 1, 100) for p in range(300))
    assert reading(kv, 300, 0, 128, prompt=True) == Reading(whole + 64 * 300, 300)
    assert reading(kv, 1, 299, 128, prompt=False) == Reading(300, 300)


@pytest.mark.parametrize("sinks", [0, 4, 200])
def test_units_are_looked_up_as_the_kernel_does(sinks):
    """The bytes that the kernel counts as it reads."""
    settings = {"block_size": 16, "kv_sinks": sinks, "kv_window": 100, "kv_budget": 256}
    kv = config("infllm", **settings).kv
    cache = PagedCache(1, 80, 16, 1, 4)
    memory = BlockMemory(cache, kv.near, kv.units, lambda spec: torch.ones(2))
    start, blocks = 0, list(range(80))
    for query in (130, 128, 70, 1, 1, 300, 1, 200, 1):
        before = memory.reads.read
        rows = [torch.randn(query, 1, 4) for _ in range(3)]
        memory.attend([Span(start, query, blocks)])(AttentionSpec(0, 1.0), *rows)
        read = (memory.reads.read - before) // (2 * 4 * 4)
        if kv.near.first(start, 128):  # until something leaves the window the paged kernel computes, which counts nothing
            assert reading(kv, query, start, 4, prompt=query > 1).keys == read
        start += query


def test_a_sequence_owns_what_its_policy_keeps_and_gives_the_rest_back():
    kept_blocks, ends = [], []
    for policy, options in (("streaming", {"kv_window": 64}), ("h2o", {"kv_window": 32, "kv_budget": 32})):
        settings = config(policy, kv_blocks=60, max_batch_tokens=64, **options)
        engine = VirtualEngine(VirtualExecutor(VirtualClock(), Linear("flat", 1, 0, 0, Decoding(1, 0, 0))), settings)
        one = Request("long", (7,) * 1500, SamplingParams(500, ignore_eos=True))
        engine.submit(one)
        most = 0
        while engine.step():
            most = max(most, len(one.blocks))
            engine.check()
        kept_blocks.append((most, settings.kv.most_blocks))
        ends.append((len(one.output), engine.free_blocks))
    assert all(most <= bound < 20 for most, bound in kept_blocks)
    assert ends == [(500, 60)] * 2


def test_what_is_not_read_is_not_paid_for():
    """Beyond the window every decode takes as long, to a block's rounding; where everything fits a policy costs what dense attention does."""
    place = deployment()

    def gaps(policy, answer=200, **options):
        settings = config(policy, kv_blocks=2000, **options)
        shape = kept(place, settings)
        cost = attending(place, settings).roofline()
        executor = VirtualExecutor(VirtualClock(), cost, reads=None if shape is None else shape.read)
        engine, trace = VirtualEngine(executor, settings, fast_forward=False), []
        one = Request("one", (7,) * 1500, SamplingParams(answer, ignore_eos=True))
        engine.submit(one)
        while (leap := engine.begin()) is not None:
            trace.append(int(leap.ends[-1]) - leap.start)
            engine.end(leap)
        return trace

    dense = gaps("dense")
    assert dense[-1] > dense[-100] > dense[3]
    rolling = gaps("streaming", kv_window=512, block_size=1)
    assert len(set(rolling[3:])) == 1
    assert rolling[-1] < dense[3]
    for policy, options in (("streaming", {"kv_window": 4000}), ("quest", {"kv_budget": 4000}), ("minference", {"kv_budget": 4000})):
        assert gaps(policy, **options) == dense
    pages = gaps("quest", kv_budget=512)
    assert pages[:3] == dense[:3]  # prompts are computed with everything
    assert rolling[-1] < pages[-1] < dense[-1]
    layers = gaps("quest", kv_budget=512, kv_dense_layers=16)
    assert pages[-1] < layers[-1] < dense[-1]


def test_layers_with_a_window_of_their_own_keep_it():
    place = deployment()
    batch = Batch(((100, 50),), 3, 600, 4)
    other = Batch(((100, 50),), 3, 600, 4, Read(1, 1, 1))
    all_but_one = replace(place, model=replace(place.model, windows=(None, *[64] * 31))).roofline()
    all_of_them = replace(place, model=replace(place.model, windows=(64,) * 32)).roofline()
    assert all_of_them.iteration(other) == all_of_them.iteration(batch)
    assert 0 < all_but_one.iteration(batch) - all_but_one.iteration(other) < 20_000


def test_what_lies_beside_a_token_takes_memory():
    place = deployment(tensor=2)
    model, own = place.model, config("h2o", kv_blocks=None)
    each = place.works[0].kv_bytes_per_token + model.num_layers * model.num_kv_heads // 2 * 8
    assert kv_blocks(place, own) == (place.usable - place.weight_bytes) // each // 16
    assert Scenario(place, own).settled.kv_blocks == kv_blocks(place, own) < place.kv_blocks(16)


def test_streams_are_longer_than_the_context():
    scenario = Scenario(deployment(), config("streaming", kv_blocks=None, context=100_000, max_batch_tokens=4096))
    [one] = [Request("stream", (7,) * 20_000, SamplingParams(20, ignore_eos=True), arrival=0)]
    assert scenario.run([one]).result.answer.tolist() == [20]


def test_the_same_again():
    ends = []
    for _ in range(2):
        scenario = Scenario(deployment(), config("quest", kv_blocks=None, kv_budget=256), replicas=2)
        requests = [Request(f"r{i}", (7,) * (200 * i + 1), SamplingParams(60, ignore_eos=True), arrival=i * 10**7) for i in range(12)]
        ends.append(scenario.run(requests).result.finished.tolist())
    assert ends[0] == ends[1]


def test_what_has_no_such_keys_is_named():
    with pytest.raises(InputError, match="caches a latent"):
        Scenario(Deployment(find("deepseek-v3"), cluster("dgx-h200:4"), Layout(16, 2), Precision("fp16")), config("quest"))
    with pytest.raises(InputError, match="does not know what kv_policy"):
        Scenario(deployment(), config("quest"), cost=Linear("a line", 1, 1, 1, Decoding(1, 1, 1)))


def test_verified_rows_read_pages_too():
    settings = config("quest", kv_blocks=None, kv_budget=256, speculate="ngram", draft_tokens=4)
    run = Scenario(deployment(), settings, acceptance=Acceptance((0.8,))).run(
        [Request("one", (7,) * 900, SamplingParams(200, ignore_eos=True), arrival=0)]
    )
    assert run.stats.accepted_tokens > 50
