"""Devices and switches as a graph of links: builders of the usual shapes, paths, and how much can cross a cut.

An edge carries `bandwidth` B/s each way. A link's latency holds from memory to memory, so the two edges around its switch carry half
of it each; every further switch adds SWITCH_LATENCY.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, product
from typing import Final, Literal

from armillary.cluster.cluster import Cluster
from armillary.cluster.device import Link, Node, Rack
from armillary.core.errors import InputError

SWITCH_LATENCY: Final = 150
"""ns from port to port of a data centre switch; NVIDIA's Quantum-2 is sold as under 150."""

MOST_VERTICES: Final = 200_000
RADIX: Final = 64  # ports of a switch, as Quantum-2's

VertexKind = Literal["device", "switch", "nic", "host"]


@dataclass(frozen=True, slots=True)
class Vertex:
    kind: VertexKind
    name: str


@dataclass(frozen=True, slots=True)
class Edge:
    """Both ways between two vertices (by number): B/s each way, ns."""

    a: int
    b: int
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Topology:
    """`bisection` is the B/s that the best-cut halves of the devices can send each other, one way, by the shape's closed form."""

    name: str
    vertices: tuple[Vertex, ...]
    edges: tuple[Edge, ...]
    bisection: float

    @cached_property
    def devices(self) -> tuple[int, ...]:
        """The numbers of the vertices that are devices, in order."""
        return tuple(number for number, vertex in enumerate(self.vertices) if vertex.kind == "device")

    @cached_property
    def neighbours(self) -> tuple[tuple[tuple[int, Edge], ...], ...]:
        """Of every vertex: (the other end, the edge)."""
        found: list[list[tuple[int, Edge]]] = [[] for _ in self.vertices]
        for edge in self.edges:
            found[edge.a].append((edge.b, edge))
            found[edge.b].append((edge.a, edge))
        return tuple(map(tuple, found))

    def path(self, start: int, end: int) -> tuple[Edge, ...]:
        """A path of fewest edges between two vertices, () to itself. Devices forward, as NCCL's PXN has them do."""
        before: dict[int, tuple[int, Edge] | None] = {start: None}
        queue = deque([start])
        while queue and end not in before:
            at = queue.popleft()
            for other, edge in self.neighbours[at]:
                if other not in before:
                    before[other] = (at, edge)
                    queue.append(other)
        if end not in before:
            raise InputError(f"{self.name}: nothing leads from {self.vertices[start].name} to {self.vertices[end].name}", "join them")
        edges = []
        while (step := before[end]) is not None:
            end, edge = step
            edges.append(edge)
        return tuple(reversed(edges))

    def bandwidth(self, start: int, end: int) -> float:
        """B/s of one flow along `path`, alone; inf to itself."""
        return min((edge.bandwidth for edge in self.path(start, end)), default=math.inf)

    def latency(self, start: int, end: int) -> float:
        """ns along `path`."""
        return sum(edge.latency for edge in self.path(start, end))

    def cut(self, senders: Iterable[int], receivers: Iterable[int]) -> float:
        """B/s that two groups of vertices can exchange one way at most, over all paths (maximum flow, to a part in 10^5)."""
        import numpy as np
        from scipy.sparse import csr_array
        from scipy.sparse.csgraph import maximum_flow

        senders, receivers = set(senders), set(receivers)
        if not senders or not receivers or senders & receivers:
            raise InputError("a cut is between two groups that share no vertex", "give each at least one")
        source, sink = len(self.vertices), len(self.vertices) + 1
        ends = [(edge.a, edge.b, edge.bandwidth) for edge in self.edges]
        ends += [(edge.b, edge.a, edge.bandwidth) for edge in self.edges]
        leaving = {v: sum(edge.bandwidth for _, edge in self.neighbours[v]) for v in senders | receivers}
        ends += [(source, v, leaving[v]) for v in senders] + [(v, sink, leaving[v]) for v in receivers]
        rows, columns, rates = (np.array(part) for part in zip(*ends, strict=True))
        unit = sum(leaving.values()) / 2**30  # capacities are 32-bit integers
        graph = csr_array((np.rint(rates / unit).astype(np.int32), (rows, columns)), shape=(sink + 1, sink + 1))
        graph.sum_duplicates()
        return float(maximum_flow(graph.tocsr(), source, sink).flow_value) * unit


def of_node(node: Node) -> Topology:
    """One server: its devices by its fabric."""
    names = [f"{node.name}/{i}" for i in range(node.devices)]
    if node.devices == 1:
        return Topology(node.name, (Vertex("device", names[0]),), (), math.inf)
    if node.link is None:
        raise InputError(f"{node.name}'s devices are not linked", "give the node a link")
    return _fabric(node.name, names, node.fabric, node.link)


def of_rack(rack: Rack) -> Topology:
    """A domain of several nodes: one switched fabric, or a torus."""
    if rack.fabric == "torus":
        return torus(rack.shape, rack.link, rack.name)
    names = [f"{rack.name}/{n}/{i}" for n in range(rack.nodes) for i in range(rack.node.devices)]
    return _fabric(rack.name, names, rack.fabric, rack.link)


def _fabric(name: str, names: Sequence[str], fabric: str, link: Link) -> Topology:
    """Devices 0..n-1 by a fabric that gives each of them `link`."""
    count = len(names)
    devices = tuple(Vertex("device", each) for each in names)
    if fabric == "mesh":  # the device's lanes are split among its peers
        share = link.bandwidth / (count - 1)
        edges = tuple(Edge(a, b, share, link.latency) for a, b in combinations(range(count), 2))
        return Topology(name, devices, edges, (count // 2) * ((count + 1) // 2) * share)
    if fabric == "ring":
        return _grid(name, devices, (count,), link)
    middle = Vertex("host" if fabric == "pcie" else "switch", f"{name}/{fabric}")
    edges = tuple(Edge(i, count, link.bandwidth, link.latency / 2) for i in range(count))
    return Topology(name, (*devices, middle), edges, (count // 2) * link.bandwidth)


def torus(shape: Sequence[int], link: Link, name: str = "") -> Topology:
    """Devices on a torus of any number of dimensions, `link` split evenly over the two ways of each dimension that is longer than 1.

    The bisection cuts the longest dimension twice: 2 N / longest links, if that is even.
    """
    if not shape or any(side < 1 for side in shape) or math.prod(shape) > MOST_VERTICES:
        raise InputError(
            f"a torus of {' x '.join(map(str, shape)) or 'no'} devices", f"give sides of at least 1, {MOST_VERTICES:,} devices at most"
        )
    name = name or "x".join(map(str, shape))
    places = product(*(range(side) for side in shape))
    return _grid(name, tuple(Vertex("device", f"{name}/{'.'.join(map(str, place))}") for place in places), tuple(shape), link)


def _grid(name: str, devices: tuple[Vertex, ...], shape: tuple[int, ...], link: Link) -> Topology:
    count = len(devices)
    axes = [axis for axis, side in enumerate(shape) if side > 1]
    if not axes:
        return Topology(name, devices, (), math.inf)
    share = link.bandwidth / (2 * len(axes))
    edges = []
    for axis in axes:
        side, stride = shape[axis], math.prod(shape[axis + 1 :])
        # Round a side of 2 both ways lead to the same neighbour.
        width = 2 * share if side == 2 else share
        for number in range(count):
            place = number // stride % side
            if side > 2 or place == 0:
                edges.append(Edge(number, number + ((place + 1) % side - place) * stride, width, link.latency))
    return Topology(name, devices, tuple(edges), 2 * count / max(shape) * share)


def fat_tree(k: int, link: Link) -> Topology:
    """The three tiers of Al-Fares et al. (SIGCOMM 2008) with switches of `k` ports (even): k^3/4 hosts, 5k^2/4 switches, full bisection."""
    if k < 2 or k % 2 or k**3 // 4 > MOST_VERTICES:
        raise InputError(f"a fat tree of switches with {k} ports", f"give an even number with k^3/4 at most {MOST_VERTICES:,}: 2 to 92")
    half, name = k // 2, f"fat-tree-{k}"
    hosts = [Vertex("device", f"{name}/{i}") for i in range(k * half * half)]
    first = len(hosts)
    edge_switches = [Vertex("switch", f"{name}/edge{pod}.{i}") for pod in range(k) for i in range(half)]
    aggregates = [Vertex("switch", f"{name}/aggregate{pod}.{i}") for pod in range(k) for i in range(half)]
    cores = [Vertex("switch", f"{name}/core{i}.{j}") for i in range(half) for j in range(half)]
    second, third = first + len(edge_switches), first + len(edge_switches) + len(aggregates)
    edges = [Edge(host, first + host // half, link.bandwidth, link.latency / 2) for host in range(len(hosts))]
    for pod in range(k):
        for i in range(half):
            edges += [Edge(first + pod * half + i, second + pod * half + j, link.bandwidth, SWITCH_LATENCY) for j in range(half)]
            edges += [Edge(second + pod * half + i, third + i * half + j, link.bandwidth, SWITCH_LATENCY) for j in range(half)]
    return Topology(name, (*hosts, *edge_switches, *aggregates, *cores), tuple(edges), len(hosts) / 2 * link.bandwidth)


def rail_optimised(node: Node, nodes: int, radix: int = RADIX, oversubscription: float = 1.0, rack: Rack | None = None) -> Topology:
    """`nodes` servers whose i-th cards meet in the leaf switches of rail i, and all leaves in spines (NVIDIA's DGX SuperPOD).

    Half of a leaf's ports go down; `oversubscription` 2 halves what goes up. Devices share the cards evenly, several cards of one device
    act as one. Traffic between devices of one node stays in the node; between rails it goes through the node's fabric or the spines.
    With `rack`, the nodes stand in racks that are one fabric each. The bisection is that of an even number of nodes or racks.
    """
    if node.network is None or nodes < 2:
        raise InputError(f"rails join nodes with a network: {nodes} x {node.name}", "give a network and at least 2 nodes")
    if radix < 2 or not 1 <= oversubscription < math.inf:
        raise InputError(
            f"leaves of {radix} ports, oversubscribed {oversubscription} times", "give at least 2 ports and a factor from 1 on"
        )
    rails, down = min(node.nics, node.devices), max(1, radix // 2)
    card = node.network_bandwidth / rails
    leaves = rails * math.ceil(nodes / down)
    spines = math.ceil(leaves * down / radix) if leaves > 1 else 0
    if leaves > radix:
        raise InputError(
            f"{nodes} x {node.name} need {leaves} leaves, more than a spine of {radix} ports joins", "give a larger radix, or a fat tree"
        )
    inside, each = (1, of_node(node)) if rack is None else (rack.nodes, of_rack(rack))
    if nodes % inside:
        raise InputError(f"{nodes} nodes are no whole number of racks of {inside}", f"give a multiple of {inside}")
    vertices: list[Vertex] = []
    edges: list[Edge] = []
    first_leaf = nodes // inside * len(each.vertices) + nodes * rails
    if first_leaf > MOST_VERTICES:
        raise InputError(f"{nodes} x {node.name} is a graph of over {MOST_VERTICES:,} vertices", "take fewer nodes: the closed forms scale")
    into = node.network if node.host_link is None else node.host_link
    for n in range(nodes):
        if n % inside == 0:  # a new domain: all of its devices and switches come before its cards
            base = len(vertices)
            vertices += [Vertex(v.kind, f"{n // inside}/{v.name}") for v in each.vertices]
            edges += [Edge(base + e.a, base + e.b, e.bandwidth, e.latency) for e in each.edges]
        for rail in range(rails):
            nic = len(vertices)
            vertices.append(Vertex("nic", f"{n}/{node.name}/nic{rail}"))
            first = base + n % inside * node.devices
            members = [first + device for device in range(node.devices) if device * rails // node.devices == rail]
            # The card's latency holds from memory to memory: nothing is added on the way to the card.
            edges += [Edge(device, nic, max(into.bandwidth, card), 0) for device in members]
            edges.append(Edge(nic, first_leaf + rail * (leaves // rails) + n // down, card, node.network.latency / 2))
    vertices += [Vertex("switch", f"leaf{i}") for i in range(leaves)] + [Vertex("switch", f"spine{i}") for i in range(spines)]
    up = min(down, nodes) * card / oversubscription / spines if spines else 0.0
    edges += [Edge(first_leaf + leaf, first_leaf + leaves + spine, up, SWITCH_LATENCY) for leaf in range(leaves) for spine in range(spines)]
    crossing = nodes // 2 * rails * card
    if leaves > rails:  # halves of the nodes meet only through the spines
        crossing = min(crossing, leaves / 2 * up * spines)
    return Topology(f"{node.name}:{nodes}", tuple(vertices), tuple(edges), crossing)


def of_cluster(cluster: Cluster) -> Topology:
    """The graph of a cluster: its node or rack alone, or its nodes (in racks or not) on rails."""
    if cluster.rack is not None and cluster.nodes == cluster.rack.nodes:
        return of_rack(cluster.rack)
    return of_node(cluster.node) if cluster.nodes == 1 else rail_optimised(cluster.node, cluster.nodes, rack=cluster.rack)
