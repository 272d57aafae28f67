"""The ranks of a layout as a DeviceMesh, handed on explicitly: nothing here is a global."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from armillary.train.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Mesh:
    """Which mesh dimension carries what; a part is None where its degree is 1.

    Neighbouring ranks are tensor-parallel peers (they talk most), then come shards, then replicas.
    """

    layout: Layout
    world: DeviceMesh  # every dimension whose degree is above 1; ("dp_replicate",) of 1 for a single rank
    replicate: DeviceMesh | None
    shard: DeviceMesh | None
    tp: DeviceMesh | None
    data: DeviceMesh | None  # replicate x shard: what FSDP2 works on

    @property
    def dp_parts(self) -> list[DeviceMesh]:
        """The one-dimensional meshes over which data differs; a sum over each in turn is a sum over all."""
        return [part for part in (self.shard, self.replicate) if part is not None]


def build_mesh(layout: Layout, device_type: str = "cpu") -> Mesh:
    """The mesh of `layout` over the ranks of the default process group. Raises InputError when their number differs."""
    layout.check_world(dist.get_world_size())
    degrees = {"dp_replicate": layout.dp_replicate, "dp_shard": layout.dp_shard, "tp": layout.tp}
    names = tuple(name for name, degree in degrees.items() if degree > 1) or ("dp_replicate",)
    world = init_device_mesh(device_type, tuple(degrees[name] for name in names), mesh_dim_names=names)

    def part(*wanted: str) -> DeviceMesh | None:
        present = tuple(name for name in wanted if degrees[name] > 1)
        return world[present] if present else None

    mesh = Mesh(layout, world, part("dp_replicate"), part("dp_shard"), part("tp"), part("dp_replicate", "dp_shard"))
    _inherit_timeout(mesh)
    return mesh


def _inherit_timeout(mesh: Mesh) -> None:
    """Gives every group the default group's timeout: DeviceMesh makes them with torch's 30 minutes, in which a lost peer is a hang."""
    if dist.get_backend() in ("fake", "threaded"):  # simulated ranks have no timeouts
        return
    default = dist.distributed_c10d._get_default_group()
    timeout = default._get_backend(torch.device(mesh.world.device_type)).options._timeout
    for part in (mesh.replicate, mesh.shard, mesh.tp):
        if part is not None:
            dist.distributed_c10d._set_pg_timeout(timeout, part.get_group())
