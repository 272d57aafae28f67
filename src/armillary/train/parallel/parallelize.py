"""A decoder on many ranks: a layout applied to the unchanged model, behind the trainer's one interface (`apply.Parallel`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from armillary.core.errors import InputError
from armillary.kernels.attention import Attend
from armillary.models.decoder import Decoder
from armillary.models.weights import assemble, hf_name
from armillary.train.parallel.apply import OptimizerFactory, Parallel, Single, TokenLoss
from armillary.train.parallel.ddp import BucketedAllReduce, torch_ddp
from armillary.train.parallel.fsdp import ShardedLoss
from armillary.train.parallel.gradients import global_norm, reduce_partial
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.mesh import Mesh, build_mesh
from armillary.train.parallel.sharded_optimizer import ShardedOptimizer
from armillary.train.parallel.tp import TensorParallelLoss, apply_tensor_parallel


def parallelize(
    model: Decoder,
    layout: Layout,
    *,
    device_type: str = "cpu",
    compute_dtype: torch.dtype | None = None,
    replicas: Literal["torch", "buckets"] = "torch",
) -> Parallel:
    """`model` on the ranks of the default process group, laid out as `layout`; its parameters are sharded in place.

    Every rank gives the same whole model. Raises InputError when the layout does not fit the ranks or the model, or
    when a rank's weights differ from the others'. compute_dtype: as in `Single`. replicas: whether torch's DDP or the
    executor of our bucket plan sums the gradients of dp_replicate (with tp it is always the latter: DDP does not take it).
    """
    layout.check_model(model.config)
    if layout.world == 1 and not (dist.is_initialized() and dist.get_world_size() > 1):
        return Single(model, compute_dtype)
    if not dist.is_initialized():
        raise InputError(
            f"layout {layout} is for {layout.world} ranks, and this is one process",
            f"start with torchrun --nproc-per-node {layout.world} -m armillary train ..., or with --ray",
            field="layout",
        )
    mesh = build_mesh(layout, device_type)
    check_same_weights(model)
    return Distributed(model, mesh, compute_dtype, replicas)


class Distributed:
    """The `Parallel` of more than one rank. Tensor parallelism splits the model first; then one data-parallel engine goes around it:

    FSDP2 (dp_shard; with dp_replicate: HSDP), torch's DDP (dp_replicate, or dp_shard at ZeRO stage 1, whose optimizer
    is sharded), or the bucketed all-reduce.
    """

    def __init__(self, model: Decoder, mesh: Mesh, compute_dtype: torch.dtype | None, replicas: Literal["torch", "buckets"]) -> None:
        layout = mesh.layout
        self.model, self.mesh = model, mesh
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.dp_rank, self.dp_world = 0, layout.dp
        for part in reversed(mesh.dp_parts):
            self.dp_rank = self.dp_rank * part.size() + part.get_local_rank()

        loss: nn.Module = TokenLoss(model)
        if mesh.tp is not None:
            apply_tensor_parallel(model, mesh.tp, layout.sequence_parallel)
            loss = TensorParallelLoss(model, mesh.tp, layout.sequence_parallel)
        self._buckets: BucketedAllReduce | None = None
        self._sharded: ShardedLoss | None = None
        if mesh.shard is not None and layout.zero_stage > 1:
            assert mesh.data is not None
            self._sharded = ShardedLoss(loss, model, mesh.data, layout.zero_stage == 3, compute_dtype)
            self._loss = loss
            return
        if compute_dtype is not None:
            loss = _Cast(loss, compute_dtype)
        copies = mesh.shard or mesh.replicate
        if copies is not None and mesh.tp is None and replicas == "torch":
            loss = torch_ddp(loss, copies.get_group())
        elif copies is not None:
            self._buckets = BucketedAllReduce(list(model.parameters()), copies.get_group())
        self._loss = loss

    def loss_sum(self, tokens: Tensor, positions: Tensor, targets: Tensor, attend: Attend) -> Tensor:
        loss: Tensor = self._loss(tokens, positions, targets, attend)
        return loss

    @contextmanager
    def sync_gradients(self, last: bool) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self._engines(last):
                stack.enter_context(engine)
            yield
        if last and self.mesh.tp is not None and self._sharded is None:
            reduce_partial(self.model.parameters(), self.mesh.tp)

    def _engines(self, last: bool) -> Iterator[AbstractContextManager[Any]]:
        if self._sharded is not None:
            yield self._sharded.around_backward(last)
        elif isinstance(self._loss, DistributedDataParallel) and not last:
            yield self._loss.no_sync()
        elif self._buckets is not None:
            yield self._buckets.around_backward(last)

    def sum_over_dp(self, values: Tensor) -> Tensor:
        values = values.detach().clone()
        for part in self.mesh.dp_parts:
            dist.all_reduce(values, group=part.get_group())
        return values

    def any_rank(self, flag: bool) -> bool:
        raised = torch.tensor([int(flag)], device=self.mesh.world.device_type)
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised.item())

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        return global_norm(parameter.grad for parameter in parameters if parameter.grad is not None)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._reshard()
        return self.model.named_parameters()

    def make_optimizer(self, factory: OptimizerFactory) -> Optimizer:
        optimizer = factory(self.named_parameters())
        if self.mesh.shard is not None and self.mesh.layout.zero_stage == 1:
            return ShardedOptimizer(optimizer, self.mesh.shard.get_group())
        return optimizer

    def state_dict(self) -> dict[str, Any]:
        self._reshard()
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._reshard()
        self.model.load_state_dict(state)

    def whole_model(self) -> Decoder | None:
        whole = {}
        for name, parameter in self.named_parameters():  # one at a time: no rank but the first ever holds two of them
            value = parameter.detach()
            value = value.full_tensor() if isinstance(value, DTensor) else value
            if self.rank == 0:
                whole[hf_name(name)] = value.cpu().clone()
        return assemble(self.model.config, whole.keys(), whole.__getitem__) if self.rank == 0 else None

    def _reshard(self) -> None:
        """After a forward without backward the last unit is still whole; its shards are what optimizer and checkpoint know."""
        if isinstance(self._loss, FSDPModule):
            self._loss.reshard()


class _Cast(nn.Module):
    """A loss module run on weights cast to `dtype`; gradients come back in the weights' own (as in `Single`)."""

    def __init__(self, loss: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.loss, self.dtype = loss, dtype

    def forward(self, *arguments: Any) -> Tensor:
        weights = {name: weight.to(self.dtype) for name, weight in self.loss.named_parameters()}
        loss: Tensor = torch.func.functional_call(self.loss, weights, arguments)
        return loss


@torch.no_grad()
def check_same_weights(model: nn.Module) -> None:
    """Raises InputError, on all ranks, that names the first parameter whose bits are not the same on all ranks."""
    names = [name for name, _ in model.named_parameters()]
    sums = torch.stack([_bits(parameter) for parameter in model.parameters()])
    extremes = torch.cat((sums, -sums))
    dist.all_reduce(extremes, dist.ReduceOp.MAX)
    differs = (extremes[: len(names)] != -extremes[len(names) :]).nonzero().flatten().tolist()
    if differs:
        raise InputError(
            f"{names[differs[0]]} is not the same on all ranks ({len(differs)} of {len(names)} parameters differ)",
            "load the same weights, or seed every rank alike before the model is made",
        )


def _bits(tensor: Tensor) -> Tensor:
    """Sum of a tensor's bits read as integers: independent of the order of adding, so of the number of threads."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
