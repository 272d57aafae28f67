"""How a dense decoder lies over the chips of a torus or a switch: Pope et al.'s partitions, each with what it computes, reads and moves.

A batch takes the longer of its arithmetic and its reads, and then its collectives: nothing is hidden behind anything else. With all of it hidden
it takes the longest of the three, and no implementation takes less. Pope et al., "Efficiently scaling Transformer inference" (MLSys 2023).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations, permutations
from math import prod
from typing import Literal

from armillary.cluster.cluster import Cluster
from armillary.cluster.device import Link
from armillary.core.errors import CapacityError, InputError
from armillary.core.units import format_bytes
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.batch import Batch, Span, pairs
from armillary.models.graph.cost import USABLE
from armillary.models.graph.parameters import active_parameters
from armillary.models.graph.precision import Precision
from armillary.models.graph.spread import Attention, Axis, Spread, cached_elements, check, collectives, padded
from armillary.models.graph.work import Work
from armillary.sim.collectives import terms

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Mesh:
    """`shape` chips; on a torus only whole axes make groups, elsewhere every divisor does. More than a `domain` holds meet by `link` but within one, by `near`."""

    shape: tuple[int, ...]
    torus: bool
    link: Link | None
    domain: int = 1
    near: Link | None = None

    @property
    def chips(self) -> int:
        return prod(self.shape)

    @cached_property
    def hops(self) -> dict[int, int]:
        """Messages in a row of a ring among so many chips, by the sizes of groups that there are: on a torus axis after axis."""
        if not self.torus:
            return {size: size - 1 for size in range(1, self.chips + 1) if self.chips % size == 0}
        found: dict[int, int] = {}
        for count in range(len(self.shape) + 1):
            for axes in combinations(self.shape, count):
                found[prod(axes)] = min(found.get(prod(axes), self.chips), sum(axis - 1 for axis in axes))
        return dict(sorted(found.items()))


def mesh(cluster: Cluster, chips: int | None = None) -> Mesh:
    """`chips` of a cluster (all of them unless said), of a torus a part whose last axes are halved. Raises InputError for what there is not."""
    chips = cluster.devices if chips is None else chips
    if not 1 <= chips <= cluster.devices:
        raise InputError(
            f"{chips:,} chips of {cluster.name}, which has {cluster.devices:,}", "ask for fewer, or name a larger cluster", field="chips"
        )
    if chips == 1:
        return Mesh((1,), False, None)
    inside = chips <= cluster.domain
    link = cluster.domain_link if inside else cluster.network
    if link is None:
        raise InputError(
            f"{cluster.name} has no link among {chips} devices", "name a node, a rack or a network: dgx-a100:8/ib-hdr", field="cluster"
        )
    if not inside:
        return Mesh((chips,), False, replace(link, bandwidth=cluster.network_per_device), cluster.domain, cluster.domain_link)
    if cluster.rack is None or cluster.rack.fabric != "torus":
        return Mesh((chips,), False, link)
    return Mesh(_part(cluster.rack.shape, chips), True, link)


def _part(shape: tuple[int, ...], chips: int) -> tuple[int, ...]:
    left = list(shape)
    for place in range(len(left) - 1, -1, -1):
        while prod(left) > chips and left[place] % 2 == 0:
            left[place] //= 2
    if prod(left) != chips:
        raise InputError(
            f"{chips} chips are no part of a torus of {' x '.join(map(str, shape))}", "halve its axes: give a power of two", field="chips"
        )
    return tuple(left)


@dataclass(frozen=True)
class Plan:
    """A partition of a phase's batch. Times are s of one pass, `moved` the bytes that each chip sends, `held` and `cache` bytes of the fullest chip."""

    spread: Spread
    phase: Phase
    sequences: int
    tokens: int  # of a pass
    compute: float
    memory: float
    network: float
    moved: float
    held: int  # weights, and a layer of those that are gathered
    cache: int
    mfu: float

    @property
    def seconds(self) -> float:
        """Collectives after everything else."""
        return max(self.compute, self.memory) + self.network

    @property
    def hidden(self) -> float:
        """Everything at once."""
        return max(self.compute, self.memory, self.network)

    @property
    def chip_seconds(self) -> float:
        """What a token costs."""
        return self.seconds * self.spread.chips / self.tokens


@dataclass(frozen=True)
class Problem:
    """A model in `precision` on a mesh of a cluster's devices. Weights are expanded to what activations are in, and multiplied so."""

    model: Architecture
    cluster: Cluster
    mesh: Mesh
    precision: Precision

    def __post_init__(self) -> None:
        check(self.model)

    @cached_property
    def flops(self) -> float:
        """FLOP/s that a chip's products attain."""
        return self.cluster.device.attainable(self.products)

    @property
    def products(self) -> str:
        """The format in which products are computed: that of activations, or the closest wider one that the device has."""
        named = (self.precision.activations, "bf16", "fp16", "fp32")
        return next((one for one in named if one in self.cluster.device.flops), self.precision.activations)

    @property
    def usable(self) -> int:
        """Bytes of a chip for weights and cache."""
        return int(self.cluster.device.memory * USABLE)

    @cached_property
    def _works(self) -> dict[int, Work]:
        return {}

    def work(self, heads: int) -> Work:
        if heads not in self._works:
            self._works[heads] = Work(replace(self.model, num_heads=heads), precision=self.precision)
        return self._works[heads]

    def spreads(self, sequences: int) -> Iterator[Spread]:
        """All partitions of the mesh that a batch of so many sequences allows."""
        kinds: tuple[Attention, ...] = ("heads", "batch") if self.mesh.chips > 1 else ("heads",)
        for size in self.mesh.hops:
            for kind in kinds:
                yield Spread(size, self.mesh.chips // size, 1, kind)
                if size > 1 and sequences % size == 0 and (size < self.mesh.chips or kind == "batch"):
                    yield Spread(1, self.mesh.chips // size, size, kind)

    def held(self, spread: Spread) -> int:
        """Bytes of weights on a chip, with the layer that is gathered."""
        whole = self.work(padded(self.model, spread)).weight_bytes
        layer = whole // self.model.num_layers * spread.gathered // spread.chips if spread.gathered > 1 else 0
        return -(-whole // spread.chips) + layer

    def cached(self, spread: Spread, sequences: int) -> int:
        """Bytes of the fullest chip's cache that a token of every sequence takes."""
        return self.precision.kv_bytes(cached_elements(self.model, spread, sequences))

    def context(self, spread: Spread, sequences: int, share: float | None = None) -> int:
        """The longest context that fits: in what weights leave, or in a `share` of a chip's memory."""
        room = self.usable - self.held(spread) if share is None else self.cluster.device.memory * share
        return max(0, int(room // self.cached(spread, sequences)))

    def price(self, spread: Spread, phase: Phase, sequences: int, context: int) -> Plan:
        """One pass: all `context` tokens of every sequence, or one more token of each."""
        work, chips = self.work(padded(self.model, spread)), self.mesh.chips
        queries = context if phase == "prefill" else 1
        spans = []
        for window in work.windows:
            keys = context + 1 if window is None else min(context + 1, window)
            spans.append(
                Span(0, 0, sequences * keys) if phase == "decode" else Span(sequences * pairs(queries, 0, window), sequences * queries, 0)
            )
        batch = Batch(sequences * queries if phase == "prefill" else 0, sequences if phase == "decode" else 0, sequences, tuple(spans))
        read = -(-work.weight_bytes // (spread.hidden * spread.inner))  # what a chip multiplies with, gathered or its own
        cache = self.cached(spread, sequences) * (context + (phase == "decode"))
        moved, network = self._communicated(spread, batch.tokens, sequences)
        # A sequence's attention stays on one chip where the cache is split by sequences: fewer of them than chips leave some idle.
        mine = sequences // spread.gathered
        idle = -(-mine // (group := chips // spread.gathered)) * group / mine - 1 if spread.attention == "batch" else 0.0
        attention = work.of(Batch(0, 0, 0, tuple(spans))).flops
        compute = (work.of(batch).flops + idle * attention) / chips / self.flops
        memory = (read + cache) / self.cluster.device.attainable_bandwidth
        useful = 2 * active_parameters(self.model) * batch.tokens / chips / self.cluster.device.peak(self.products)
        mfu = useful / (max(compute, memory) + network)
        return Plan(spread, phase, sequences, batch.tokens, compute, memory, network, moved, self.held(spread), cache, mfu)

    def _communicated(self, spread: Spread, tokens: int, rows: int) -> tuple[float, float]:
        """Bytes that a chip sends, and s; of more chips than a domain holds, with those axes within one whose collectives gain most."""
        those = [one for one in collectives(self.model, spread, tokens, rows) if one.ranks > 1 and self.mesh.link is not None]
        sizes = [
            terms(one.name, one.ranks)[1]
            * (self.precision.weight_bytes if one.weights else self.precision.activation_bytes)(round(one.elements))
            for one in those
        ]
        orders: list[tuple[Axis, ...]] = list(permutations(("hidden", "inner", "gathered"))) if self.mesh.near is not None else [()]
        times = []
        for order in orders:
            near, inside = set[Axis](), 1
            for axis in order:
                inside *= getattr(spread, axis)
                if self.mesh.domain % inside:
                    break
                near.add(axis)
            seconds = 0.0
            for one, size in zip(those, sizes, strict=True):
                link = self.mesh.near if near.issuperset(one.axes) else self.mesh.link
                assert link is not None
                hops = self.mesh.hops.get(one.ranks, one.ranks - 1)
                seconds += one.repeat * (hops * link.latency * 1e-9 + size / link.bandwidth)
            times.append(seconds)
        return sum(one.repeat * size for one, size in zip(those, sizes, strict=True)), min(times)

    def fits(self, plan: Plan) -> bool:
        return plan.held + plan.cache <= self.usable

    def ranked(self, phase: Phase, sequences: int, context: int) -> list[Plan]:
        """All partitions that fit, the quickest first; of equals the one that moves less. Raises CapacityError with what is short and what would fit."""
        tried = [self.price(spread, phase, sequences, context) for spread in self.spreads(sequences)]
        found = sorted((one for one in tried if self.fits(one)), key=lambda one: (one.seconds, one.moved))
        if not found:
            raise self._too_large(min(tried, key=lambda one: one.held + one.cache), context)
        return found

    def _too_large(self, least: Plan, context: int) -> CapacityError:
        """What the partition that takes least lacks."""
        device, chips = self.cluster.device, self.mesh.chips
        where = f"{self.model.name} in {self.precision.weights} over {chips} x {device.name}"
        if least.held > self.usable:
            return CapacityError(
                f"{where} takes {format_bytes(least.held)} of each, {format_bytes(least.held - self.usable)} more than the {format_bytes(self.usable)} that it has for it",
                f"take at least {-(-least.held * chips // self.usable)} of them, or a smaller format (--weights int8, int4)",
                field="chips",
            )
        longest = self.context(least.spread, least.sequences)
        batch = next(
            (size for size in range(least.sequences - 1, 0, -1) if any(self.context(one, size) > context for one in self.spreads(size))), 0
        )
        fewer = f", {batch} sequences" if batch else ""
        return CapacityError(
            f"{where}: {least.sequences} sequences of {context:,} tokens take {format_bytes(least.cache)} of each beside {format_bytes(least.held)} of weights, "
            f"{format_bytes(least.held + least.cache - self.usable)} too much",
            f"what fits: contexts of {longest:,} tokens{fewer}, a smaller cache (--kv-dtype int8), or more chips",
            field="context",
        )
