"""Megatron tensor parallelism of the unchanged decoder (Shoeybi et al. 2019): which module is split which way.

Two all-reduces a layer forward and two backward: the inputs of `self_attn` and `mlp` become replicated DTensors
once, so that the gradients of their two or three projections are summed before they are reduced.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, PrepareModuleInput, RowwiseParallel, parallelize_module
from torch.nn import functional

from armillary.kernels.attention import Attend, AttentionSpec
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.train.parallel.vocabulary import vocabulary_parallel_cross_entropy


class WholeParameters(ParallelStyle):
    """A module whose parameters every rank holds whole and whose input is laid out as `placement`.

    Where the ranks see different rows (tokens under sequence parallelism, heads in the query and key norms), each
    has only its part of the parameters' gradient: a DTensor that is still `Partial`.
    """

    def __init__(self, placement: Placement) -> None:
        super().__init__()
        self.placement = placement

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        module.register_forward_pre_hook(lambda _, x: (DTensor.from_local(x[0], device_mesh, [self.placement], run_check=False), *x[1:]))
        module.register_forward_hook(lambda _, __, out: out.to_local())
        return module


class RepeatedHeads(ParallelStyle):
    """A key or value projection with fewer heads than ranks: every rank holds it whole and takes the head that its queries read."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Replicate())
        module.register_forward_hook(partial(self._own_head, device_mesh))
        return module

    def _own_head(self, mesh: DeviceMesh, module: nn.Module, inputs: Any, out: DTensor) -> Tensor:
        size = out.shape[-1] // self.heads
        head = mesh.get_local_rank() * self.heads // mesh.size()
        return out.to_local(grad_placements=[Partial()]).narrow(-1, head * size, size)


class ShardedRows(ParallelStyle):
    """The head: its weight is split by rows of the vocabulary; the loss reads it, nothing calls it."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, device_mesh, Shard(0))
        return module


def _distribute(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        whole = distribute_tensor(parameter.data, mesh, [placement], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(whole, requires_grad=parameter.requires_grad))


def tensor_parallel_plan(config: ModelConfig, degree: int, sequence_parallel: bool) -> dict[str, ParallelStyle]:
    """Module path -> how it is split, over `degree` ranks. Between blocks activations are whole, or split by tokens."""
    rows: Placement = Shard(0) if sequence_parallel else Replicate()
    attention, mlp = "layers.*.self_attn", "layers.*.mlp"
    kv = ColwiseParallel if config.num_kv_heads % degree == 0 else partial(RepeatedHeads, config.num_kv_heads)
    plan: dict[str, ParallelStyle] = {
        "embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=rows),
        attention: PrepareModuleInput(input_layouts=(rows, None, None), desired_input_layouts=(Replicate(), None, None)),
        f"{attention}.qkv.q_proj": ColwiseParallel(),
        f"{attention}.qkv.k_proj": kv(),
        f"{attention}.qkv.v_proj": kv(),
        f"{attention}.o_proj": RowwiseParallel(output_layouts=rows),
        mlp: PrepareModuleInput(input_layouts=(rows,), desired_input_layouts=(Replicate(),)),
        f"{mlp}.gate_up.gate_proj": ColwiseParallel(),
        f"{mlp}.gate_up.up_proj": ColwiseParallel(),
        f"{mlp}.down_proj": RowwiseParallel(output_layouts=rows),
        "norm": WholeParameters(rows),
        "lm_head": ShardedRows(),
    }
    norms = ["input_layernorm", "post_attention_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"] if config.sandwich_norms else []
    plan |= {f"layers.*.{norm}": WholeParameters(rows) for norm in norms}
    if config.qk_norm:
        plan |= {f"{attention}.{norm}": WholeParameters(Shard(1)) for norm in ("q_norm", "k_norm")}
    return plan


def apply_tensor_parallel(model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    """Splits the decoder's parameters over `mesh` in place. Every rank must hold the same whole model."""
    for style in (plan := tensor_parallel_plan(model.config, mesh.size(), sequence_parallel)).values():
        style.src_data_rank = None  # every rank slices its own copy: nothing is sent
    parallelize_module(model, mesh, plan)
    model.tie()


class TensorParallelLoss(nn.Module):
    """`Parallel.loss_sum` of a tensor-parallel decoder, as one module for what wraps it.

    Sequence parallelism wants a multiple of the ranks in tokens: some are added behind the last document, which
    attention never sees, and taken away before the loss.
    """

    def __init__(self, model: Decoder, mesh: DeviceMesh, sequence_parallel: bool) -> None:
        super().__init__()
        self.model = model
        self.mesh = mesh
        self.sequence_parallel = sequence_parallel

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor, attend: Attend) -> Tensor:
        count = tokens.shape[0]
        rows: Placement = Replicate()
        if self.sequence_parallel:
            rows = Shard(0)
            if missing := -count % self.mesh.size():
                tokens, positions = functional.pad(tokens, (0, missing)), functional.pad(positions, (0, missing))
                attend = _FirstTokens(attend, count)
        hidden = self.model.hidden(tokens, positions, attend)
        whole = DTensor.from_local(hidden, self.mesh, [rows], run_check=False).redistribute(placements=[Replicate()])
        hidden = whole.to_local(grad_placements=[Partial()])[:count]
        weight, config = self.model.lm_head.weight, self.model.config
        assert isinstance(weight, DTensor)
        first = self.mesh.get_local_rank() * -(-config.vocab_size // self.mesh.size())
        return vocabulary_parallel_cross_entropy(
            hidden, weight.to_local(), targets, first, self.mesh.get_group(), softcap=config.logit_softcap
        )


class _FirstTokens:
    """An `Attend` over the first `count` tokens; those behind them are padding and get zeros."""

    def __init__(self, attend: Attend, count: int) -> None:
        self.attend = attend
        self.count = count

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = self.attend(spec, q[: self.count], k[: self.count], v[: self.count])
        return torch.cat((out, out.new_zeros(q.shape[0] - self.count, *out.shape[1:])))
