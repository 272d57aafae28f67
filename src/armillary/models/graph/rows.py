"""An operation before its batch is known: every count is linear in a few features of the batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from armillary.models.graph.architecture import Architecture
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.sim.operation import Axis, Kind

Terms = Mapping[str, int]
"""Feature of the batch -> coefficient; `work.FEATURES` says what they are."""


@dataclass(frozen=True)
class Row:
    """Counts as in `Operation`, of one repetition.

    It happens where the feature `gate` is 1. `m` is the feature that becomes the operation's; where `expert`, these rows are spread over as
    many matrices as the feature `experts` says. `resident` bytes of its weights lie on the device.
    """

    name: str
    kind: Kind
    gate: str = "always"
    flops: Terms = field(default_factory=dict)
    weight_bytes: Terms = field(default_factory=dict)
    kv_bytes: Terms = field(default_factory=dict)
    read_bytes: Terms = field(default_factory=dict)
    write_bytes: Terms = field(default_factory=dict)
    message_bytes: Terms = field(default_factory=dict)
    m: str = ""
    n: int = 0
    k: int = 0
    matrices: int = 1
    expert: bool = False
    ranks: int = 1
    axis: Axis | None = None
    repeat: int = 1
    resident: int = 0


@dataclass(frozen=True)
class Device:
    """Writes the rows of one device of a layout, in the model's shapes and formats."""

    model: Architecture
    layout: Layout
    precision: Precision

    @property
    def between(self) -> str:
        """The feature that counts this device's tokens outside of attention and MLP."""
        return "shard" if self.layout.sequence_parallel else "tokens"

    def gemm(
        self,
        name: str,
        n: int,
        k: int,
        *,
        m: str = "tokens",
        matrices: int = 1,
        bias: bool = False,
        gate: str = "always",
        copy: bool = False,
    ) -> Row:
        """`matrices` products [m, k] x [k, n]. `copy`: the weights are another row's."""
        weights = self.precision.weight_bytes(n * k * matrices) + self.precision.activation_bytes(n) * bias
        return Row(
            name,
            Kind.GEMM,
            gate,
            flops={m: 2 * n * k * matrices},
            weight_bytes={gate: weights},
            read_bytes={m: self.precision.activation_bytes(k * matrices)},
            write_bytes={m: self.precision.activation_bytes(n * matrices)},
            m=m,
            n=n,
            k=k,
            matrices=matrices,
            resident=0 if copy else weights,
        )

    def memory(
        self, name: str, read: int, write: int, *, m: str = "tokens", weights: int = 0, cached: int = 0, gate: str = "always"
    ) -> Row:
        """Activations read and written for each of m, `weights` elements read once, `cached` bytes of the cache written for each."""
        held = self.precision.activation_bytes(weights)
        return Row(
            name,
            Kind.MEMORY,
            gate,
            weight_bytes={gate: held} if weights else {},
            kv_bytes={m: cached} if cached else {},
            read_bytes={m: self.precision.activation_bytes(read)} if read else {},
            write_bytes={m: self.precision.activation_bytes(write)} if write else {},
            m=m,
            resident=held,
        )

    def message(self, name: str, elements: int, ranks: int, axis: Axis, *, m: str = "tokens", gate: str = "always") -> Row:
        """A collective or a send of so many elements for each of m."""
        kind = Kind.SEND if name == "send" else Kind.COLLECTIVE
        return Row(name, kind, gate, message_bytes={m: self.precision.activation_bytes(elements)}, ranks=ranks, axis=axis)

    def norm(self, width: int, *, m: str | None = None, name: str = "norm", gate: str = "always") -> Row:
        weights = width * (2 if self.model.norm_bias else 1)
        return self.memory(name, width, width, m=self.between if m is None else m, weights=weights, gate=gate)

    def gathered(self) -> Iterator[Row]:
        """Before what needs all tokens on every tensor rank."""
        if self.layout.sequence_parallel:
            yield self.message("all_gather", self.model.hidden_size, self.layout.tensor_parallel, Axis.TENSOR)

    def reduced(self) -> Iterator[Row]:
        """After what leaves a partial sum on every tensor rank."""
        if self.layout.tensor_parallel > 1:
            name = "reduce_scatter" if self.layout.sequence_parallel else "all_reduce"
            yield self.message(name, self.model.hidden_size, self.layout.tensor_parallel, Axis.TENSOR)
