"""A model's operations on devices of a cluster, as a cost model takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.cluster.cluster import Cluster
from armillary.cluster.device import Device, Link
from armillary.core.errors import CapacityError, InputError
from armillary.core.units import format_bytes
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.batch import Batch as Sums
from armillary.models.graph.batch import Span, pairs
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.rows import Row
from armillary.models.graph.work import Work
from armillary.sim.batch import Batch
from armillary.sim.collectives import terms
from armillary.sim.costs.roofline import Rates, Roofline, Stage
from armillary.sim.operation import Axis

USABLE = 0.9  # share of a device's memory that weights and keys may take: the rest is for activations, the runtime, fragments
_PRODUCTS = {"int4": "fp16", "q8_0": "fp16", "fp4": "fp16"}  # weight-only formats: unpacked, then multiplied in 16 bits


@dataclass(frozen=True, slots=True)
class Deployment:
    """A model on some devices of a cluster: one replica. Raises InputError for an impossible layout, CapacityError for one that does not fit."""

    model: Architecture
    cluster: Cluster
    layout: Layout
    precision: Precision

    def __post_init__(self) -> None:
        if self.layout.devices > self.cluster.devices:
            raise InputError(
                f"a replica of {self.layout.devices} devices on a cluster of {self.cluster.devices}",
                f"lower tensor_parallel x pipeline_parallel to {self.cluster.devices}, or name a larger cluster",
                field="cluster",
            )
        if self.kv_memory <= 0:
            raise CapacityError(
                f"{self.model.name} in {self.precision.weights} over {self.layout.devices} devices takes {format_bytes(self.weight_bytes)} of "
                f"each, {format_bytes(-self.kv_memory)} more than the {format_bytes(self.usable)} that a {self.device.name} has for it",
                f"spread it over at least {self.least_devices} such devices, use a smaller format (int8, int4), or a larger device",
                field="layout",
            )

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def usable(self) -> int:
        """Bytes of a device that weights, keys and values may take."""
        return int(self.device.memory * USABLE)

    @property
    def works(self) -> tuple[Work, ...]:
        """What a device of each pipeline stage does."""
        return tuple(Work(self.model, self.layout, self.precision, stage) for stage in range(self.layout.pipeline_parallel))

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights on the fullest device."""
        return max(work.weight_bytes for work in self.works)

    @property
    def least_devices(self) -> int:
        """How many devices hold the weights at all."""
        return -(-sum(work.weight_bytes for work in self.works) * self.layout.tensor_parallel // self.usable)

    @property
    def kv_memory(self) -> int:
        """Bytes of the fullest device that are left for keys and values; negative where the weights do not fit."""
        return self.usable - self.weight_bytes

    @property
    def product_dtype(self) -> str:
        """The format in which weights are multiplied."""
        return _PRODUCTS.get(self.precision.weights, self.precision.weights)

    def kv_tokens(self) -> int:
        """How many tokens' keys and values a replica holds."""
        return min((self.usable - work.weight_bytes) // work.kv_bytes_per_token for work in self.works)

    def kv_blocks(self, block_size: int) -> int:
        """How many KV blocks a replica has. Raises CapacityError when not even one fits."""
        blocks = self.kv_tokens() // block_size
        if not blocks:
            raise CapacityError(
                f"beside its weights {self.model.name} leaves {format_bytes(self.kv_memory)} a device, less than one KV block of {block_size} tokens",
                "use more devices or a smaller format",
                field="layout",
            )
        return blocks

    def roofline(
        self,
        *,
        launch: float = 0.0,
        host: float = 0.0,
        host_per_sequence: float = 0.0,
        without: Callable[[Row], bool] = lambda row: False,
    ) -> Roofline:
        """What an iteration costs, but those rows that it goes `without`. Weights of 4 bits are multiplied in 16, for that is how kernels
        use them."""
        works = self.works
        rates = Rates(self.device.attainable(self.product_dtype), self.device.attainable_bandwidth, launch, host, host_per_sequence)
        stages = [self._stage(work, [place for place, row in enumerate(work.rows) if not without(row)]) for work in works]
        name = f"roofline of {self.model.name} on {self.layout.devices} x {self.device.name}"
        return Roofline(name, stages, BatchFeatures(works[0]), rates)

    def stages(self) -> list[Roofline]:
        """What an iteration costs each pipeline stage's device, from taking its input to having sent it on."""
        works = self.works
        rates = Rates(self.device.attainable(self.product_dtype), self.device.attainable_bandwidth)
        name = f"a stage of {self.model.name} on {self.layout.devices} x {self.device.name}"
        return [Roofline(name, [self._stage(work, range(len(work.rows)))], BatchFeatures(works[0]), rates) for work in works]

    def _stage(self, work: Work, kept: Sequence[int]) -> Stage:
        def matrix(*names: str) -> NDArray[np.int64]:
            summed: NDArray[np.int64] = np.array([work.coefficients(name) for name in names], dtype=np.int64).sum(axis=0)
            return summed

        latency, per_byte = np.zeros(len(work.rows)), np.zeros(len(work.rows))
        for place, row in enumerate(work.rows):
            if row.axis is not None and place in kept:
                link, bandwidth = self.link(row.axis, work.stage)
                messages, share = terms(row.name, row.ranks)
                latency[place], per_byte[place] = messages * link.latency, share * 1e9 / bandwidth
        gates = np.array([work.basis.index(row.gate) for row in work.rows])
        repeats = np.array([row.repeat for row in work.rows])
        moved = matrix("weight_bytes", "kv_bytes", "read_bytes", "write_bytes")
        rows = list(kept)
        flops, message = matrix("flops")[rows], matrix("message_bytes")[rows]
        return Stage(flops, moved[rows], message, gates[rows], repeats[rows], latency[rows], per_byte[rows])

    def link(self, axis: Axis, stage: int = 0) -> tuple[Link, float]:
        """By which the ranks of an axis meet in a pipeline stage, and the B/s that each device has there: the domain's fabric where none of
        the axis' groups lies in two domains, else the network, whose cards a node's devices share. A stage's sends go to the next one's devices."""
        layout, domain = self.layout, self.cluster.domain
        width = layout.tensor_parallel * layout.data_parallel
        first, ranks = stage * width, {Axis.TENSOR: layout.tensor_parallel, Axis.EXPERT: layout.expert_parallel}.get(axis, 1)
        reach = width if axis is Axis.PIPELINE else ranks - 1  # from a group's first device to its last
        if all(start // domain == (start + reach) // domain for start in range(first, first + width, ranks)):
            link, bandwidth = self.cluster.domain_link, 0.0 if self.cluster.domain_link is None else self.cluster.domain_link.bandwidth
        else:
            link, bandwidth = self.cluster.network, self.cluster.network_per_device
        if link is None:
            raise InputError(
                f"{self.cluster.name} has no link among {layout.devices} devices",
                "name a node, such as dgx-h100, or a network: h100x8:2/ib-ndr",
            )
        return link, bandwidth


class BatchFeatures:
    """`Work.features` of what a simulator knows of a batch. Of decodes it knows the sum of what they read: under a window, their mean is cut."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self.varying: Sequence[int] = [index for index, name in enumerate(work.basis) if name.endswith("]")]

    def of(self, batch: Batch) -> Sequence[int]:
        found = self.varied(batch)
        spans = tuple([Span(*found[place : place + 3]) for place in range(0, len(found), 3)])
        return self._work.features(Sums(batch.prompt_tokens, batch.decodes, batch.sampled, spans))

    def varied(self, batch: Batch) -> Sequence[int]:
        found: list[int] = []
        for window in self._work.windows:
            if batch.read is not None and window is None:  # layers without a window read what a policy says
                found += (batch.read.prompt_pairs, batch.read.prompt_keys, batch.read.decode_keys)
                continue
            pair = keys = 0
            for query, cached in batch.prompts:
                pair += pairs(query, cached, window)
                keys += cached + query if window is None else min(cached + query, window + query - 1)
            found += (pair, keys, _one_keys(batch.decodes, batch.cached, window))
        return found

    def read(self, sequences: int, cached: NDArray[np.int64]) -> Sequence[NDArray[np.int64] | int]:
        found: list[NDArray[np.int64] | int] = []
        for window in self._work.windows:
            found += (0, 0, _keys(sequences, cached, window))
        return found


def _one_keys(sequences: int, cached: int, window: int | None) -> int:
    """`_keys` of one batch."""
    return cached + sequences if window is None or not sequences else min(window, cached // sequences + 1) * sequences


def _keys(sequences: int, cached: NDArray[np.int64], window: int | None) -> NDArray[np.int64]:
    """Keys that `sequences` decodes read after `cached` tokens in all."""
    if window is None or not sequences:
        return cached + sequences
    return np.minimum(window, cached // sequences + 1) * sequences
