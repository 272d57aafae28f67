"""FSDP2 and HSDP (Zhao et al. 2023): one sharded unit a block, and one for embeddings, final norm and head."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from armillary.models.decoder import Decoder


class ShardedLoss:
    """`loss`, the module whose forward runs a micro-batch, with the parameters of its `model` sharded in place.

    mesh: (dp_shard,), or (dp_replicate, dp_shard) for HSDP. reshard: free a block's parameters between forward and
    backward (ZeRO-3), or keep them (ZeRO-2). Gradients are reduced in float32 whatever `compute_dtype` is, as sums.

    On a CPU, where FSDP2 has no streams to overlap with, the next block's parameters are gathered while one computes, and gradients
    are reduced while the next block's backward runs: a step of SmolLM2-135M on two ranks of a core each takes 3.4 s instead of 3.9
    (ZeRO-3; 3.1 instead of 3.8 with ZeRO-2). DDP takes 2.7: the rest is what gloo's copies through the loopback device cost.
    """

    def __init__(self, loss: nn.Module, model: Decoder, mesh: DeviceMesh, reshard: bool, compute_dtype: torch.dtype | None) -> None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32 if compute_dtype else None)
        blocks: list[Any] = [fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard) for block in model.layers]
        whole = fully_shard(loss, mesh=mesh, mp_policy=policy, reshard_after_forward=False)  # what it holds is used first in backward
        self._loss: Any = whole
        self._reduction = _BackgroundReduction() if mesh.device_type == "cpu" and mesh.ndim == 1 else None
        for unit in (whole, *blocks):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # a divisor of 1 would otherwise ask for PREMUL_SUM, which only NCCL has
            unit._set_unshard_async_op(mesh.device_type == "cpu")
            if self._reduction is not None:
                unit.set_custom_reduce_scatter(self._reduction)
        if mesh.device_type == "cpu":
            for block, following in itertools.pairwise(blocks):
                block.set_modules_to_forward_prefetch([following])

    @contextmanager
    def around_backward(self, last: bool) -> Iterator[None]:
        """`Parallel.sync_gradients`: until the last micro-batch gradients stay whole and unreduced on each rank."""
        self._loss.set_requires_gradient_sync(last)
        self._loss.set_is_last_backward(last)
        if self._reduction is None:
            yield
            return
        # To a gradient that is there already FSDP2 adds the reduced one at once, so that has to be whole by then.
        self._reduction.at_once = any(parameter.grad is not None for parameter in self._loss.parameters())
        yield
        self._reduction.wait()


class _BackgroundReduction(DefaultReduceScatter):
    """FSDP2's reduce-scatter that runs on beside the backward pass; `wait` before its results are read."""

    MOST = 2  # at a time, for each keeps a block's whole gradient

    def __init__(self) -> None:
        self.at_once = False
        self._running: list[tuple[dist.Work, Tensor]] = []

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False) -> dist.Work:
        self.wait(0 if self.at_once else self.MOST - 1)
        work = super().__call__(output_tensor, input_tensor, group, op, async_op=True)
        self._running.append((work, input_tensor))
        self.wait(0 if self.at_once else self.MOST)
        return work

    def wait(self, most: int = 0) -> None:
        """Returns when at most `most` are running."""
        while len(self._running) > most:
            self._running.pop(0)[0].wait()
