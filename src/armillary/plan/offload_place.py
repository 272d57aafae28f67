"""A device with RAM and a disk behind it, from the catalogue or a profile of this machine, with the rates by which FlexGen's cost model prices it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from armillary.cluster.cluster import Cluster
from armillary.cluster.device import Device
from armillary.cluster.profile import Profile
from armillary.core.errors import InputError
from armillary.serve.offload.cost import T4, Hardware, Work


@dataclass(frozen=True)
class Place:
    """A device with the memory behind it: sizes in bytes, rates in B/s. `element`: bytes of a number as it is computed with there."""

    device: Device
    arena: int
    ram: int
    disk: int
    link: float  # RAM to accelerator and back, each way
    read: float  # from disk
    write: float  # 0: as FlexGen fitted it
    host: float = 0.0  # B/s of the host's memory, at which its processor attends to keys; 0 where they move
    products: float = 0.0  # FLOP/s, of those that compute what is offloaded; 0: the device's
    fitted: bool = False  # by FlexGen, a T4: its rates are used in place of these
    source: str = ""

    @property
    def here(self) -> bool:
        """Whether the engine can carry the plan out: on a processor, part of whose memory stands for the accelerator's."""
        return self.device.kind == "cpu"

    @property
    def element(self) -> int:
        return 4 if self.here else 2

    def hardware(self, work: Work) -> Hardware:
        """As the cost model takes it, for this block."""
        sizes = {"arena": float(self.arena), "ram": float(self.ram), "disk": float(self.disk)}
        # Every batch reads the layer's weights again: few sequences take what that takes.
        reading = 2 * work.batch / work.element * self.device.attainable_bandwidth
        if self.fitted:
            writes = ("ram_to_disk_cache_p", "ram_to_disk_hidden_p", "ram_to_disk_g") if self.write else ()
            return replace(T4, **sizes, products_g=min(T4.products_g, reading), disk_to_ram=self.read, **dict.fromkeys(writes, self.write))
        q, k = work.widths
        products = self.products or self.device.attainable(next(name for name in ("fp16", "bf16", "fp32") if name in self.device.flops))
        bandwidth, reads = self.device.attainable_bandwidth, 4 * q / (2 * work.element * k)  # FLOPs of attention a byte of cache
        return Hardware(
            **sizes,
            ram_to_arena=self.link,
            arena_to_ram_cache=self.link,
            arena_to_ram_hidden=self.link,
            disk_to_ram=self.read,
            ram_to_disk_cache_p=self.write,
            ram_to_disk_hidden_p=self.write,
            ram_to_disk_g=self.write,
            products_p=products,
            products_g=min(products, reading),
            attention_p=products,
            attention_g=min(products, reads * bandwidth),
            cpu=reads * self.host,
        )


def place(
    cluster: Cluster,
    profile: Profile | None,
    *,
    arena: int | None = None,
    ram: int | None = None,
    disk: int | None = None,
    read: float | None = None,
    write: float | None = None,
) -> Place:
    """One device of a cluster, or the machine of a profile, with what is not said taken from the catalogue. Raises InputError for what it lacks."""
    node, device = cluster.node, cluster.device
    if device.kind == "cpu":
        return _machine(device, profile, arena, ram, disk, read, write)
    fitted = device.name == "t4"
    if node.host_link is None:
        raise InputError(
            f"the catalogue does not say how {device.name} meets its host",
            "name a node, or describe one in a TOML file (docs/cluster.md)",
            field="cluster",
        )
    if ram is None:
        ram = node.host_memory // node.devices if node.host_memory is not None else int(T4.ram) if fitted else None
    if ram is None:
        raise InputError(
            f"the catalogue does not say how much memory {node.name} has beside its devices",
            "give it, such as --memory 256GB",
            field="memory",
        )
    if disk is None:
        disk = node.disk.size if node.disk is not None else int(T4.disk) if fitted else 0
    if fitted:
        read, write = T4.disk_to_ram if read is None else read, write or 0.0
    elif node.disk is not None:
        read, write = node.disk.read if read is None else read, node.disk.write if write is None else write
    return Place(
        device,
        arena if arena is not None else int(T4.arena) if fitted else device.memory,
        ram,
        disk,
        node.host_link.bandwidth,
        *_disk(node.name, disk, read, write),
        host=0.0 if node.cpu is None else node.cpu.attainable_bandwidth * node.sockets / node.devices,
        fitted=fitted,
        source="FlexGen's fit of a T4 on its machine"
        if fitted
        else f"{node.host_link.name} each way, products and memory by the catalogue",
    )


def _machine(
    device: Device, profile: Profile | None, arena: int | None, ram: int | None, disk: int | None, read: float | None, write: float | None
) -> Place:
    """Part of this machine's memory stands for the accelerator's: copies by one thread are the link, and torch's products compute."""
    if profile is None:
        raise InputError(
            f"{device.name} has no measured rates of copies here",
            "give a profile: armillary calibrate --output profile.json",
            field="cluster",
        )
    if arena is None:
        raise InputError(
            "no size is given for the part of this machine's memory that stands for an accelerator's",
            "give it, such as --accelerator-memory 2GB",
            field="accelerator_memory",
        )
    if not disk and (read is not None or write is not None):
        raise InputError("the speed of a disk is given, and none of it may be filled", "give --disk, or leave its speed out", field="disk")
    copies = [rate.bandwidth / 2 for rate in profile.memory if rate.operation == "copy" and rate.threads == 1]
    products = [rate.flops for rate in profile.products if (rate.library, rate.dtype) == ("torch", "fp32")]
    if not copies or not products:
        raise InputError(
            "the profile has no copy by one thread or no fp32 product of torch's", "run armillary calibrate again, whole", field="cluster"
        )
    return Place(
        device,
        arena,
        device.memory - arena if ram is None else ram,
        disk or 0,
        max(copies),
        *_disk("this machine", disk or 0, read, write),
        products=max(products),
        source=f"copies by one thread, torch's fp32 products and reads, of the profile ({profile.taken})",
    )


def _disk(name: str, size: int, read: float | None, write: float | None) -> tuple[float, float]:
    """B/s from and to a disk, which matter where there is one."""
    if size and (read is None or write is None):
        raise InputError(f"nobody says how fast the disk of {name} is", "give it in B/s: --disk-read 2GB --disk-write 1GB", field="disk")
    return read or 1.0, 1.0 if write is None else write
