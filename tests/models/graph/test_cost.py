"""A model on hardware: what fits, and a roofline that equals its operations one by one."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.cluster.cluster import cluster
from armillary.core.errors import CapacityError, InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.sim.batch import Batch
from armillary.sim.collectives import seconds, terms
from armillary.sim.operation import Kind

PLACES = {
    "7b": ("llama-2-7b", "a100-80g-sxm", Layout()),
    "70b": ("llama-2-70b", "dgx-h100", Layout(tensor_parallel=8)),
    "stages": ("llama-2-70b", "dgx-a100", Layout(tensor_parallel=4, pipeline_parallel=2)),
    "experts": ("mixtral-8x7b", "dgx-h100", Layout(tensor_parallel=2)),
    "windows": ("mistral-7b", "h100", Layout()),
}


def deployed(name):
    model, where, layout = PLACES[name]
    return Deployment(architecture(model), cluster(where), layout, Precision())


def by_hand(deployment, sequences):
    """ns: each operation the longer of its FLOPs and its bytes, each collective by the ring's formula."""
    device, ns = deployment.device, 0.0
    for work in deployment.works:
        for one in work.operations(work.batch(sequences)):
            once = max(one.flops / device.attainable("fp16"), one.bytes / device.attainable_bandwidth)
            if one.kind in (Kind.COLLECTIVE, Kind.SEND):
                link = deployment.cluster.domain_link
                once += seconds(one.name, one.message_bytes, one.ranks, link.bandwidth, link.latency / 1e9)
            ns += once * one.repeat * 1e9
    return ns


@pytest.mark.parametrize("name", PLACES)
def test_the_roofline_is_the_sum_of_the_operations(name):
    deployment = deployed(name)
    roofline = deployment.roofline()
    for prompts, decodes in (([(512, 0)], []), ([], [700] * 9), ([(300, 200), (7, 5000)], [33, 33])):
        batch = Batch(tuple(prompts), len(decodes), sum(decodes), len(prompts) + len(decodes))
        assert roofline.iteration(batch) == pytest.approx(by_hand(deployment, [*prompts, *((1, read) for read in decodes)]), abs=1)


@settings(max_examples=25)
@given(name=st.sampled_from(list(PLACES)), sequences=st.integers(1, 200), read=st.integers(0, 9000), count=st.integers(1, 30))
def test_many_decodes_are_each_of_them(name, sequences, read, count):
    roofline, cached = deployed(name).roofline(launch=2000, host=1e5, host_per_sequence=777), read * sequences + 3
    each = [roofline.iteration(Batch((), sequences, cached + i * sequences, sequences)) for i in range(count)]
    assert roofline.decodes(sequences, cached, count).tolist() == each


def test_a_prompt_of_512_takes_what_was_measured():
    """Llama-2-7B on one A100-80G: Vidur's profile has 32 layers of 1.05 ms at 512 tokens and of 0.292 ms at one, without attention and head."""
    roofline = deployed("7b").roofline()
    assert roofline.iteration(Batch(((512, 0),), sampled=1)) / 1e6 == pytest.approx(32 * 1.05, rel=0.1)
    assert roofline.iteration(Batch((), 1, 0, 1)) / 1e6 == pytest.approx(32 * 0.292, rel=0.15)


def test_keys_take_what_weights_leave():
    deployment = deployed("7b")
    assert deployment.kv_tokens() == (72_000_000_000 - 2 * 6_738_415_616) // 524_288
    assert deployment.kv_blocks(16) == deployment.kv_tokens() // 16


def test_what_does_not_fit_says_by_how_much_and_what_would():
    with pytest.raises(CapacityError, match=r"138 GB of each.*66 GB more.*at least 2 such devices") as caught:
        Deployment(architecture("llama-2-70b"), cluster("a100-80g-sxm"), Layout(), Precision())
    assert caught.value.field == "layout"
    assert Deployment(architecture("llama-2-70b"), cluster("2xa100-80g-sxm"), Layout(tensor_parallel=2), Precision()).kv_tokens() > 0


def test_more_devices_than_there_are():
    with pytest.raises(InputError, match="8 devices on a cluster of 1"):
        Deployment(architecture("llama-2-7b"), cluster("h100"), Layout(tensor_parallel=8), Precision())


@pytest.mark.parametrize(
    ("where", "layout", "links"),
    [
        # Experts of a stage meet within their node, whatever other stages there are; sends leave it only where the next stage is elsewhere.
        ("dgx-h100:2", Layout(tensor_parallel=8, expert_parallel=8, pipeline_parallel=2), {"all_to_all": "nvlink", "send": "ib"}),
        (
            "dgx-h100:2",
            Layout(tensor_parallel=4, expert_parallel=4, pipeline_parallel=4),
            {"all_to_all": "nvlink", "send": "nvlink ib nvlink"},
        ),
        # Experts over two nodes, and tensor ranks within each.
        ("dgx-h100:2", Layout(tensor_parallel=8, data_parallel=2, expert_parallel=16), {"all_to_all": "ib", "all_gather": "nvlink"}),
        # Nodes of three: the second pair lies in both.
        ("h100x3:2/ib-ndr", Layout(tensor_parallel=2, pipeline_parallel=3), {"all_reduce": "nvlink ib nvlink"}),
    ],
)
def test_groups_of_an_axis_meet_where_they_lie(where, layout, links):
    model = replace(architecture("mixtral-8x7b"), mixture=replace(architecture("mixtral-8x7b").mixture, experts=16))
    deployment = Deployment(model, cluster(where), layout, Precision())
    fast, slow = deployment.cluster.domain_link, deployment.cluster.network
    assert fast.name.startswith("nvlink")
    stages = [deployment._stage(work, range(len(work.rows))) for work in deployment.works]
    for name, expected in links.items():
        met = []
        for work, stage in zip(deployment.works, stages, strict=True):
            places = [place for place, row in enumerate(work.rows) if row.name == name and row.ranks > 1]
            shares = {stage.per_byte[place] / terms(name, work.rows[place].ranks)[1] * 1e-9 for place in places}
            met += ["nvlink" if share == pytest.approx(1 / fast.bandwidth) else "ib" for share in shares]
            assert all(share == pytest.approx(1 / fast.bandwidth) or share == pytest.approx(1 / slow.bandwidth) for share in shares)
        wanted = expected.split()
        assert met == (wanted if len(wanted) > 1 else wanted * len(met))


def test_a_node_s_cards_are_shared_by_its_devices():
    """Four cards of 100 Gbit/s for eight devices: half a card each."""
    layout = Layout(tensor_parallel=16)
    deployment = Deployment(architecture("llama-2-70b"), replace(cluster("p4d"), nodes=2), layout, Precision())
    work = deployment.works[0]
    place = next(place for place, row in enumerate(work.rows) if row.name == "all_reduce")
    stage = deployment._stage(work, range(len(work.rows)))
    assert stage.per_byte[place] == pytest.approx(terms("all_reduce", 16)[1] * 1e9 / (deployment.cluster.network.bandwidth / 2))


def test_more_tokens_never_cost_less():
    roofline = deployed("70b").roofline()
    costs = [roofline.iteration(Batch(((tokens, 0),), sampled=1)) for tokens in (2, 16, 128, 1024, 8192)]
    assert costs == sorted(costs)
    assert np.all(np.diff(roofline.decodes(8, 100, 1000)) >= 0)
