"""Topologies: closed forms equal maximum flow, brute force on small ones, published totals on large ones."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.cluster import catalogue, topology
from armillary.cluster.cluster import cluster
from armillary.cluster.device import Link
from armillary.cluster.topology import SWITCH_LATENCY, Topology, fat_tree, of_cluster, rail_optimised, torus
from armillary.core.errors import InputError

LINK = Link("l", "a link", 60e9, 1000)


def halves(graph: Topology) -> float:
    """What the first half of the devices can send to the second."""
    middle = len(graph.devices) // 2
    return graph.cut(graph.devices[:middle], graph.devices[middle:])


def worst_halves(graph: Topology) -> float:
    """The bisection by trying every half that holds device 0."""
    first, *rest = graph.devices
    return min(
        graph.cut({first, *some}, set(rest) - set(some)) for some in combinations(rest, len(graph.devices) // 2 - 1)
    )  # fmt: skip


@pytest.mark.parametrize("k", [2, 4, 6, 8])
def test_a_fat_tree_has_k_cubed_over_four_hosts_and_full_bisection(k: int) -> None:
    tree = fat_tree(k, LINK)
    assert len(tree.devices) == k**3 // 4
    assert sum(vertex.kind == "switch" for vertex in tree.vertices) == 5 * k**2 // 4
    assert len(tree.edges) == 3 * k**3 // 4
    assert tree.bisection == pytest.approx(k**3 / 8 * LINK.bandwidth)
    assert halves(tree) == pytest.approx(tree.bisection, rel=1e-5)
    ports = [len(tree.neighbours[number]) for number, vertex in enumerate(tree.vertices) if vertex.kind == "switch"]
    assert set(ports) == {k}


def test_paths_of_a_fat_tree_pass_one_three_or_five_switches() -> None:
    tree = fat_tree(4, LINK)
    for other, edges in ((1, 2), (2, 4), (4, 6)):
        assert len(tree.path(0, other)) == edges
        assert tree.latency(0, other) == LINK.latency + (edges - 2) * SWITCH_LATENCY
        assert tree.bandwidth(0, other) == LINK.bandwidth
    assert tree.path(3, 3) == ()


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 2), (4, 4), (4, 2, 2), (4, 4, 4), (2, 6, 4), (8, 1, 2)])
def test_a_torus_is_cut_twice_through_its_longest_side(shape: tuple[int, ...]) -> None:
    graph = torus(tuple(sorted(shape, reverse=True)), LINK)
    assert halves(graph) == pytest.approx(graph.bisection, rel=1e-5)
    leaving = [sum(edge.bandwidth for _, edge in graph.neighbours[device]) for device in graph.devices]
    assert leaving == pytest.approx([LINK.bandwidth] * len(graph.devices))  # a device's link is all that leaves it
    assert max(len(graph.path(0, other)) for other in graph.devices) == sum(side // 2 for side in shape)  # the diameter


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 2)])
def test_no_half_of_a_small_torus_is_cut_more_cheaply(shape: tuple[int, ...]) -> None:
    graph = torus(shape, LINK)
    assert worst_halves(graph) == pytest.approx(graph.bisection, rel=1e-5)


def test_a_pod_of_tpu_v4_has_about_the_bisection_that_google_publishes() -> None:
    """24 TB/s for 4,096 chips (Cloud TPU documentation); links of 50 GB/s make it 25.6."""
    link = catalogue.link("ici-v4")
    pod = torus((16, 16, 16), link)
    assert pod.bisection == pytest.approx(25.6e12)
    assert pod.bisection == pytest.approx(24e12, rel=0.07)


def test_the_nvlink_domain_of_an_nvl72() -> None:
    rack = of_cluster(cluster("gb200-nvl72"))
    assert len(rack.devices) == 72
    assert rack.bisection == 36 * 900e9
    assert halves(rack) == pytest.approx(rack.bisection, rel=1e-5)
    assert rack.latency(0, 71) == catalogue.link("nvlink-5").latency
    assert sum(edge.bandwidth for edge in rack.edges) * 2 == pytest.approx(130e12, rel=0.01)


@pytest.mark.parametrize("text", ["dgx-h100", "mi300x8", "tpu-v4-tray", "4xa100-80g-pcie", "tpu-v4-cube"])
def test_every_fabric_has_the_bisection_of_its_closed_form(text: str) -> None:
    graph = of_cluster(cluster(text))
    assert halves(graph) == pytest.approx(graph.bisection, rel=1e-5)
    link = cluster(text).domain_link
    assert link is not None
    assert graph.latency(0, 1) == link.latency


@pytest.mark.parametrize(("text", "nodes", "radix", "oversubscription"), [
    ("dgx-h100", 2, 64, 1), ("dgx-h100", 16, 16, 1), ("p4d", 4, 64, 1), ("p5", 2, 64, 1), ("dgx-a100", 16, 16, 2), ("h100x2", 8, 8, 4),
])  # fmt: skip
def test_rails_carry_what_the_cards_send_unless_oversubscribed(text: str, nodes: int, radix: int, oversubscription: float) -> None:
    node = cluster(text).node
    graph = rail_optimised(node, nodes, radix=radix, oversubscription=oversubscription)
    assert len(graph.devices) == nodes * node.devices
    assert graph.bisection == pytest.approx(nodes // 2 * node.network_bandwidth / oversubscription)
    assert halves(graph) == pytest.approx(graph.bisection, rel=1e-5)


def test_the_same_card_of_two_nodes_is_one_leaf_apart() -> None:
    node = cluster("dgx-h100").node
    graph = rail_optimised(node, 2)
    there = graph.devices[node.devices]
    assert graph.latency(graph.devices[0], there) == catalogue.link("ib-ndr").latency
    assert graph.bandwidth(graph.devices[0], there) == 50e9
    assert graph.bandwidth(graph.devices[0], graph.devices[1]) == 450e9


def test_two_racks_meet_by_their_trays_cards() -> None:
    racks = of_cluster(cluster("gb200-nvl72:2"))
    assert len(racks.devices) == 144
    assert racks.bisection == 72 * 50e9  # every device has a card; within a rack NVLink has 18 times as much each
    assert halves(racks) == pytest.approx(racks.bisection, rel=1e-5)
    assert racks.bandwidth(racks.devices[0], racks.devices[71]) == 900e9
    assert racks.bandwidth(racks.devices[0], racks.devices[72]) == 50e9


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_paths_join_their_ends_and_cuts_are_symmetric(shape: list[int], data: st.DataObject) -> None:
    graph = torus(shape, LINK)
    a, b = (data.draw(st.integers(0, len(graph.devices) - 1)) for _ in range(2))
    at = a
    for edge in graph.path(a, b):
        assert at in (edge.a, edge.b)
        at = edge.a + edge.b - at
    assert at == b
    assert len(graph.path(a, b)) == len(graph.path(b, a))
    if a != b:
        assert graph.cut([a], [b]) == pytest.approx(graph.cut([b], [a]), rel=1e-5)
        assert graph.cut([a], [b]) >= graph.bandwidth(a, b) * (1 - 1e-5)


@pytest.mark.parametrize(
    ("build", "problem"),
    [
        (lambda: fat_tree(5, LINK), "a fat tree of switches with 5 ports"),
        (lambda: torus((), LINK), "a torus of no devices"),
        (lambda: torus((1000, 1000), LINK), "a torus of 1000 x 1000 devices"),
        (lambda: rail_optimised(catalogue.node("tpu-v4-tray"), 4), "rails join nodes with a network"),
        (lambda: rail_optimised(catalogue.node("dgx-h100"), 10_000), "more than a spine of 64 ports joins"),
        (lambda: fat_tree(4, LINK).cut([0], [0, 1]), "share no vertex"),
        (lambda: rail_optimised(catalogue.node("gb200-tray"), 20, rack=catalogue.rack("gb200-nvl72")), "no whole number of racks of 18"),
        (lambda: topology.of_node(catalogue.node("t4-flexgen")).path(0, 5), "nothing leads"),
    ],
)
def test_what_cannot_be_built_is_told(build: object, problem: str) -> None:
    with pytest.raises((InputError, IndexError)) as caught:
        build()  # type: ignore[operator]
    assert isinstance(caught.value, IndexError) or problem in caught.value.problem
