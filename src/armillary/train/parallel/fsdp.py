"""FSDP2 and HSDP (Zhao et al. 2023): one sharded unit a block, and one for embeddings, final norm and head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from armillary.models.decoder import Decoder


def apply_fsdp(loss: nn.Module, model: Decoder, mesh: DeviceMesh, reshard: bool, compute_dtype: torch.dtype | None) -> None:
    """Shards `model`'s parameters in place; `loss` is the module around it whose forward runs a micro-batch.

    mesh: (dp_shard,), or (dp_replicate, dp_shard) for HSDP. reshard: free a block's parameters between forward and
    backward (ZeRO-3), or keep them (ZeRO-2). Gradients are reduced in float32 whatever `compute_dtype` is, as sums.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # what it holds is used first in backward
    for unit in loss.modules():
        if isinstance(unit, FSDPModule):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # a divisor of 1 would otherwise ask for PREMUL_SUM, which only NCCL has


@contextmanager
def fsdp_around_backward(loss: nn.Module, last: bool) -> Iterator[None]:
    """`Parallel.sync_gradients`: until the last micro-batch gradients stay whole and unreduced on each rank."""
    assert isinstance(loss, FSDPModule)
    loss.set_requires_gradient_sync(last)
    loss.set_is_last_backward(last)
    yield
