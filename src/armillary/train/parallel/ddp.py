"""Data parallelism (Li et al. 2020): the bucket plan as an object, an executor of it, and torch's own DDP.

Gradients are sums over ranks, never means: the loss is already divided by the global count of scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

FIRST_BUCKET_BYTES = 1 << 20  # torch's sizes: the first is small so that communication starts early
BUCKET_BYTES = 25 << 20


@dataclass(frozen=True, slots=True)
class Bucket:
    """Parameters whose gradients travel in one all-reduce, as indices into the plan's parameters."""

    parameters: tuple[int, ...]
    bytes: int
    launch_after: int  # the parameter whose gradient completes it when gradients come in the planned order


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Which gradients travel together, and in which order the buckets leave: the same on all ranks, or they deadlock."""

    buckets: tuple[Bucket, ...]

    @classmethod
    def of(
        cls, gradients: Sequence[tuple[int, torch.dtype]], ready: Sequence[int], first: int = FIRST_BUCKET_BYTES, cap: int = BUCKET_BYTES
    ) -> BucketPlan:
        """gradients: (bytes, dtype) of each parameter; ready: their indices in the order in which gradients appear.

        A bucket closes with the parameter that brings it to its limit. Each dtype fills buckets of its own, the first
        of which has the small limit; buckets that never fill leave last.
        """
        filling: dict[torch.dtype, list[int]] = {}
        opened: set[torch.dtype] = set()
        closed: list[list[int]] = []
        for index in ready:
            dtype = gradients[index][1]
            bucket = filling.setdefault(dtype, [])
            bucket.append(index)
            if sum(gradients[i][0] for i in bucket) >= (cap if dtype in opened else first):
                closed.append(filling.pop(dtype))
                opened.add(dtype)
        closed += filling.values()
        return cls(tuple(Bucket(tuple(b), sum(gradients[i][0] for i in b), b[-1]) for b in closed))


def bucket_plan(parameters: Sequence[nn.Parameter], first: int = FIRST_BUCKET_BYTES, cap: int = BUCKET_BYTES) -> BucketPlan:
    """The plan for gradients that appear in reverse order of registration. Sharded parameters count their own shard."""
    sizes = [(local.numel() * local.element_size(), local.dtype) for local in map(_local, parameters)]
    return BucketPlan.of(sizes, range(len(parameters) - 1, -1, -1), first, cap)


class BucketedAllReduce:
    """Carries a `BucketPlan` out while backward runs: a bucket whose gradients are all there leaves, in plan order.

    Works on any local tensors, so also beneath tensor parallelism, where torch's DDP does not. `synchronise` False
    only accumulates. Call `finish` after backward: parameters that got no gradient count as zeros.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup, plan: BucketPlan | None = None) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self.plan = plan or bucket_plan(self.parameters)
        self.group = group
        self.synchronise = True
        self._bucket_of = {index: number for number, bucket in enumerate(self.plan.buckets) for index in bucket.parameters}
        self._reset()
        for index, parameter in enumerate(self.parameters):
            parameter.register_post_accumulate_grad_hook(lambda _, index=index: self._ready(index))  # type: ignore[no-untyped-call]

    def _reset(self) -> None:
        self._missing = [set(bucket.parameters) for bucket in self.plan.buckets]
        self._sent: list[tuple[Tensor, Any]] = []  # flat gradients of a bucket, and the all-reduce that works on them

    def _ready(self, index: int) -> None:
        if self.synchronise:
            self._missing[self._bucket_of[index]].discard(index)
            while len(self._sent) < len(self._missing) and not self._missing[len(self._sent)]:
                self._send()

    def _send(self) -> None:
        parameters = [self.parameters[index] for index in self.plan.buckets[len(self._sent)].parameters]
        flat = torch.cat([_gradient(parameter).reshape(-1) for parameter in parameters])
        self._sent.append((flat, dist.all_reduce(flat, group=self.group, async_op=True)))

    @torch.no_grad()
    def finish(self) -> None:
        """Waits for every bucket and puts the sums back into the gradients."""
        while len(self._sent) < len(self.plan.buckets):
            self._send()
        for bucket, (flat, work) in zip(self.plan.buckets, self._sent, strict=True):
            work.wait()
            offset = 0
            for parameter in (self.parameters[index] for index in bucket.parameters):
                gradient = _gradient(parameter)
                gradient.copy_(flat[offset : offset + gradient.numel()].view_as(gradient))
                offset += gradient.numel()
        self._reset()

    @contextmanager
    def around_backward(self, last: bool) -> Iterator[None]:
        """`Parallel.sync_gradients`: only the last micro-batch's backward sends."""
        self.synchronise = last
        yield
        if last:
            self.finish()


def _local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's gradient of `parameter`, made of zeros where backward left none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad)


def torch_ddp(module: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
    """torch's DDP around `module`, summing: its own hook divides by the number of ranks."""
    wrapped = DistributedDataParallel(module, process_group=group, gradient_as_bucket_view=True)
    wrapped.register_comm_hook(group, lambda _, bucket: _sum(bucket, group))  # DDP refuses a hook whose annotations are strings
    return wrapped


def _sum(bucket: Any, group: dist.ProcessGroup) -> Any:
    sent = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    return sent.get_future().then(lambda future: future.value()[0])
