"""What is simulated where prompts and answers have engines of their own: both deployments, how many of each, and the link between them."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

from armillary.cluster.cluster import Cluster
from armillary.cluster.device import Link
from armillary.core.errors import InputError
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.work import Work
from armillary.serve.request import Request
from armillary.serve.simulation.disaggregated import Disaggregated, Side
from armillary.serve.simulation.pipeline import busy
from armillary.serve.simulation.scenario import Run, Scenario, summed
from armillary.serve.workload.requests import Source


@dataclass(frozen=True, slots=True)
class Phases:
    """`prefill.replicas` engines for prompts and `decode.replicas` for answers; a decode engine pulls keys and values over its `link`.

    What nobody has pulled yet lies where it was computed, so all of a prefill engine's pool is its buffer. `paired`: each prefill engine
    belongs to one decode engine, on the same node. The scenarios' routers say nothing here: see `Disaggregated`.
    """

    prefill: Scenario
    decode: Scenario
    link: Link
    paired: bool = False

    def __post_init__(self) -> None:
        first, second = self.prefill.deployment, self.decode.deployment
        if first.model != second.model or first.precision.kv != second.precision.kv:
            raise InputError(
                f"keys and values of {first.model.name} in {first.precision.kv} cannot be those of {second.model.name} in {second.precision.kv}",
                "give both phases the same model and the same format of keys and values",
                field="kv_dtype",
            )
        if (wanted := self.prefill.config.kv_policy) != "dense":
            raise InputError(
                f"a decode worker has no use for what kv_policy {wanted} has left of a prompt",
                "simulate with --kv-policy dense",
                field="kv_policy",
            )
        if self.prefill.adapters is not None:
            raise InputError(
                "adapters are not simulated with prefill and decode workers", "simulate replicas, or leave --adapters out", field="adapters"
            )
        if self.paired and self.prefill.replicas != self.decode.replicas:
            raise InputError(
                f"{self.prefill.replicas} prefill and {self.decode.replicas} decode engines are no pairs",
                "give as many of each",
                field="paired",
            )

    @property
    def replicas(self) -> int:
        """As many as there are of the phase that has more: by so much a simulation must be longer."""
        return max(self.prefill.replicas, self.decode.replicas)

    @property
    def devices(self) -> int:
        """Of all engines."""
        return sum(one.deployment.layout.devices * one.replicas for one in (self.prefill, self.decode))

    @property
    def context(self) -> int:
        """Most tokens of a request."""
        return self.prefill.context

    @property
    def token_bytes(self) -> int:
        """Bytes of keys and values that a token of a prompt moves."""
        deployment = self.decode.deployment
        return Work(deployment.model, Layout(), deployment.precision, 0).kv_bytes_per_token

    def times(self, prefill: int, decode: int) -> Phases:
        """The same with so many engines of each phase."""
        return replace(self, prefill=replace(self.prefill, replicas=prefill), decode=replace(self.decode, replicas=decode))

    def single(self) -> Phases:
        """One engine of each phase."""
        return self.times(1, 1)

    def run(self, requests: Iterable[Request] | Source) -> Run:
        """`requests`, in the order of their arrival, to their end; a `Source` hears of those that end.

        Raises InputError for a request that could never run, CapacityError when a queue passes its bound.
        """
        prefill, decode = (_side(one) for one in (self.prefill, self.decode))
        pool, blocks = prefill.config, self.decode.settled.kv_blocks
        assert pool.kv_blocks is not None
        assert blocks is not None
        buffer = pool.kv_blocks * pool.block_size
        simulation = Disaggregated(
            prefill, decode, self.link, self.token_bytes, buffer, paired=self.paired, fast_forward=self.prefill.fast_forward
        )
        began = time.perf_counter()
        result = simulation.run(requests)
        wall = time.perf_counter() - began
        engines = [one.engine for one in (*simulation.prefill.replicas, *simulation.decode.replicas)]
        return Run(result, summed(engine.stats for engine in engines), blocks, wall, busy(engines))


def _side(scenario: Scenario) -> Side:
    lanes = scenario.in_flight
    stages = scenario.deployment.stages() if lanes > 1 else ()
    return Side(scenario.priced, scenario.lane, scenario.replicas, scenario.drafting, lanes, stages)


def transfer_link(place: Cluster, prefill: Deployment, decode: Deployment, *, near: bool) -> Link:
    """All that leads from a prefill engine to a decode engine: each device of the smaller of them moves its share at the same time, over the
    fabric of their domain (`near`) or its share of the node's network cards.

    Raises InputError where the cluster has no such link.
    """
    lanes = min(prefill.layout.devices, decode.layout.devices)
    one = place.domain_link if near else place.network
    if one is None:
        raise InputError(
            f"{place.name} has no {'link among its devices' if near else 'network'} for keys and values to move over",
            "name a node, such as dgx-h100, or a network: h100x8:2/ib-ndr",
            field="cluster",
        )
    each = one.bandwidth if near else place.network_per_device
    name = one.name if lanes == 1 else f"{lanes} x {one.name}"
    return dataclasses.replace(one, name=name, bandwidth=each * lanes)
