"""Adapters in virtual time: what they hold, what a batch pays for those it has, and who asks for which."""

from collections import Counter

import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.find import find
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.serve.config import EngineConfig
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.adapters import Adapters
from armillary.serve.simulation.scenario import Scenario
from armillary.serve.workload import fixed, poisson, requests
from armillary.serve.workload.adapters import Adapted, Popularity
from armillary.serve.workload.requests import Listed, arrivals


def deployment(model="llama-2-7b", tensor=1):
    return Deployment(find(model), cluster("dgx-a100"), Layout(tensor_parallel=tensor), Precision())


def config(**options):
    return EngineConfig(**{"max_loras": 64, "lora_memory": "6 GB", "max_queue": 10**6, **options})


def test_parameters():
    """What peft says of all linear layers: 39,976,960 at rank 16, 159,907,840 at 64."""
    assert Adapters(1, 16).parameters(find("llama-2-7b")) == 39_976_960
    assert Adapters(1, 64).parameters(find("llama-2-7b")) == 159_907_840


def test_they_take_memory_from_the_pool():
    place = deployment(tensor=2)
    with_them = Scenario(place, config(), adapters=Adapters(64)).settled.kv_blocks
    size = 64 * 39_976_960 * 2 // 2
    assert with_them == (place.usable - place.weight_bytes - size) // place.works[0].kv_bytes_per_token // 16
    assert with_them < Scenario(place, config()).settled.kv_blocks


def test_each_distinct_one_is_read_once_an_iteration():
    """Decodes of 6 requests with 1, 2, 6 adapters or none."""
    place = deployment()
    bandwidth, took = place.device.attainable_bandwidth, []
    for names in ("", "a", "ab", "abcdef"):
        coming = [
            Request(f"r{i}", (7,) * 10, SamplingParams(50, ignore_eos=True), arrival=0, adapter=names[i % len(names)] if names else "")
            for i in range(6)
        ]
        result = Scenario(place, config(), adapters=Adapters(6)).run(coming).result
        took.append(int(result.finished[0] - result.first_token[0]))
    for count, ns in zip((1, 2, 6), took[1:], strict=True):
        assert ns - took[0] == pytest.approx(49 * count * 39_976_960 * 2 * 1e9 / bandwidth, abs=49)  # each is whole ns


def test_leaps_change_nothing():
    ends = []
    for fast in (True, False):
        popularity = Popularity(20, 1.0, 3)
        coming = popularity.each(requests(arrivals(poisson(6.0), fixed(200, 60), 60)))
        run = Scenario(deployment(), config(), fast_forward=fast, replicas=2, adapters=Adapters(20)).run(coming)
        ends.append((run.result.finished.tolist(), run.result.first_token.tolist(), run.stats.iterations))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("skew", [0.0, 1.0, 2.0])
def test_popularity(skew):
    popularity, count = Popularity(10, skew), 20_000
    seen = Counter(popularity.of(Request(f"r{i}", (1,), SamplingParams())) for i in range(count))
    whole = sum(rank**-skew for rank in range(1, 11))
    for rank in range(1, 11):
        assert seen[f"adapter {rank}"] / count == pytest.approx(rank**-skew / whole, abs=0.012)


def test_a_conversation_keeps_its_adapter():
    coming = [Request(f"r{i}", (1,), SamplingParams(), arrival=i, session=f"s{i % 3}") for i in range(30)]
    source, seen = Adapted(Listed(coming), Popularity(1000)), {}
    while source.next_time is not None:
        request = source.take()
        assert seen.setdefault(request.session, request.adapter) == request.adapter
    assert len(seen) == 3


@pytest.mark.parametrize(
    ("adapters", "options", "says"),
    [
        ((65, 16), {}, "--max-loras 65"),
        ((64, 64), {}, "--lora-memory"),
        ((1, 0), {}, "rank 0"),
    ],
)
def test_what_serve_would_not_keep(adapters, options, says):
    with pytest.raises(InputError) as caught:
        Scenario(deployment(), config(**options), adapters=Adapters(*adapters))
    assert says in str(caught.value) + str(caught.value.fix)


def test_experts_are_not_counted():
    with pytest.raises(InputError, match="not counted"):
        Scenario(deployment("mixtral-8x7b", 4), config(), adapters=Adapters(1))
