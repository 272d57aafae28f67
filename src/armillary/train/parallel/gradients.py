"""What is known of a gradient only when every shard is asked: sums still due, and its norm."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


@torch.no_grad()
def reduce_partial(parameters: Iterable[nn.Parameter], mesh: DeviceMesh) -> None:
    """Sums gradients of which each rank of `mesh` holds only its rows' part (`Partial`), in one all-reduce a dtype."""
    due: dict[torch.dtype, list[tuple[nn.Parameter, Tensor]]] = {}
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(placement.is_partial() for placement in gradient.placements):
            due.setdefault(gradient.dtype, []).append((parameter, gradient._local_tensor))
    for parts in due.values():
        flat = torch.cat([local.reshape(-1) for _, local in parts])
        dist.all_reduce(flat, group=mesh.get_group())
        offset = 0
        for parameter, local in parts:
            whole = flat[offset : offset + local.numel()].view_as(local).clone()
            parameter.grad = DTensor.from_local(whole, mesh, [Replicate()], run_check=False)
            offset += local.numel()


@torch.no_grad()
def global_norm(gradients: Iterable[Tensor]) -> Tensor:
    """L2 norm of a gradient made of plain tensors (the same on all ranks) and DTensors, every element counted once.

    Squares are added up per set of mesh dimensions over which the gradients are split, then each such sum over those
    dimensions: at most one all-reduce of a few numbers a dimension. Returns a float32 scalar, the same on all ranks.
    """
    local: dict[tuple[str, ...], list[Tensor]] = {}
    meshes: dict[str, DeviceMesh] = {}
    for gradient in gradients:
        split: tuple[str, ...] = ()
        if isinstance(gradient, DTensor):
            names = gradient.device_mesh.mesh_dim_names
            assert names is not None
            assert not any(placement.is_partial() for placement in gradient.placements)
            split = tuple(name for name, placement in zip(names, gradient.placements, strict=True) if not placement.is_replicate())
            meshes |= {name: gradient.device_mesh[name] if len(names) > 1 else gradient.device_mesh for name in split}
            gradient = gradient._local_tensor
        local.setdefault(split, []).append(gradient)
    if not local:
        return torch.zeros(())
    keys = sorted(local)
    norms = [torch.stack([torch.linalg.vector_norm(part, dtype=torch.float32) for part in local[key]]) for key in keys]
    sums = torch.stack([norm.square().sum() for norm in norms])
    for name in sorted(meshes):
        concerned = torch.tensor([name in key for key in keys], device=sums.device)
        reduced = torch.where(concerned, sums, 0.0)
        dist.all_reduce(reduced, group=meshes[name].get_group())
        sums = torch.where(concerned, reduced, sums)
    return sums.sum().sqrt()
