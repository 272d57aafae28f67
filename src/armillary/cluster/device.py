"""What a cluster is made of: devices, links, nodes and racks, each figure with where it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from armillary.core.errors import InputError

Kind = Literal["gpu", "tpu", "cpu"]
Dtype = Literal["fp64", "fp32", "tf32", "bf16", "fp16", "fp8", "int8", "fp4", "int4"]
"""What a peak can be given for; `fp32` is arithmetic in single precision throughout, `tf32` the tensor cores' rounded inputs."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one figure comes from."""

    source: str  # a datasheet, a paper's section, "measured: ..."
    url: str = ""  # where it was read
    confirmed: bool = True  # False: from memory or by analogy, not found in what could be read
    note: str = ""


@dataclass(frozen=True, slots=True)
class Device:
    """One accelerator or CPU socket. Rates are a second, sizes bytes; None is "not published"."""

    name: str
    title: str
    vendor: str
    kind: Kind
    flops: Mapping[str, float] = field(hash=False)  # peak FLOP/s (or integer OP/s) by dtype, dense: structured sparsity is not counted
    memory: int  # by the datasheet, GB of 10^9; drivers often offer a few per cent more, runtimes take some away
    bandwidth: float  # of that memory, B/s
    cache: int | None = None  # the last level before memory: L2, L3, Infinity Cache, CMEM
    power: float | None = None  # W at full load: TDP, TBP
    idle_power: float | None = None  # W
    price: float | None = None  # $/hour to rent one
    gemm_efficiency: float | None = None  # share of the 16-bit peak that large products reach
    memory_efficiency: float | None = None  # share of the bandwidth that streaming weights reaches
    link: str | None = None  # the link by which it meets its neighbours in a node
    host_link: str | None = None  # the link to its host
    provenance: Mapping[str, Provenance] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s. Raises InputError for a dtype that the device has no figure for."""
        if dtype not in self.flops:
            have = ", ".join(self.flops)
            raise InputError(f"{self.name} has no peak for {dtype!r}", f"choose one of {have}: its units or its datasheet know no other")
        return self.flops[dtype]

    def attainable(self, dtype: str) -> float:
        """FLOP/s that large products reach: the peak by the published or measured share of it (all of it where none is known)."""
        return self.peak(dtype) * (1.0 if self.gemm_efficiency is None else self.gemm_efficiency)

    @property
    def attainable_bandwidth(self) -> float:
        """B/s that streaming from memory reaches, likewise."""
        return self.bandwidth * (1.0 if self.memory_efficiency is None else self.memory_efficiency)

    def ridge(self, dtype: str) -> float:
        """FLOP/B from which arithmetic bounds and not memory: peak over bandwidth (the roofline's ridge)."""
        return self.peak(dtype) / self.bandwidth


@dataclass(frozen=True, slots=True)
class Link:
    """All that leads from one device: `bandwidth` B/s per direction and device, `latency` ns of a small message from memory to memory."""

    name: str
    title: str
    bandwidth: float
    latency: int
    provenance: Mapping[str, Provenance] = field(default_factory=dict, hash=False, compare=False, repr=False)

    def seconds(self, size: float) -> float:
        """Time of one message of `size` bytes: latency + size / bandwidth (alpha-beta)."""
        return self.latency * 1e-9 + size / self.bandwidth


Fabric = Literal["none", "switch", "mesh", "ring", "torus", "pcie"]
"""How the devices of a node or rack meet: through switches, each with each, in a ring, on a torus, or through the host's PCIe."""


@dataclass(frozen=True, slots=True)
class Disk:
    """A tier below memory: bytes, B/s."""

    size: int
    read: float
    write: float


@dataclass(frozen=True, slots=True)
class Node:
    """A server: `devices` of one kind and what surrounds them. None is "not known" or "has none"."""

    name: str
    title: str
    device: Device
    devices: int
    fabric: Fabric
    link: Link | None  # among the devices
    network: Link | None = None  # one network card
    nics: int = 0
    cpu: Device | None = None  # one socket
    sockets: int = 0
    host_memory: int | None = None
    host_link: Link | None = None  # a device to its host
    disk: Disk | None = None
    power: float | None = None  # W, the whole node at most
    price: float | None = None  # $/hour, the whole node
    provenance: Mapping[str, Provenance] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def network_bandwidth(self) -> float:
        """B/s that the node can send at once; 0 without a network."""
        return 0.0 if self.network is None else self.network.bandwidth * self.nics

    @property
    def hourly_price(self) -> float | None:
        """$/hour of the node: its own price, else its devices'."""
        if self.price is not None:
            return self.price
        return None if self.device.price is None else self.device.price * self.devices


@dataclass(frozen=True, slots=True)
class Rack:
    """Nodes that one fabric joins into a domain: `shape` is the torus of devices where the fabric is one."""

    name: str
    title: str
    node: Node
    nodes: int
    fabric: Fabric
    link: Link
    shape: tuple[int, ...] = ()
    power: float | None = None  # W
    price: float | None = None  # $/hour
    provenance: Mapping[str, Provenance] = field(default_factory=dict, hash=False, compare=False, repr=False)

    @property
    def devices(self) -> int:
        return self.node.devices * self.nodes

    @property
    def hourly_price(self) -> float | None:
        """$/hour of the rack: its own price, else its nodes'."""
        if self.price is not None:
            return self.price
        each = self.node.hourly_price
        return None if each is None else each * self.nodes
