"""How much memory a step will take, before the first one: the step itself, run on tensors that have shapes and no contents."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from armillary.core.units import format_bytes
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.train.loss import CHUNK, in_one_loop
from armillary.train.memory.checkpointing import Level, apply_checkpointing
from armillary.train.memory.counter import Alive
from armillary.train.optimizers.choose import algorithm

_STEP_COPIES: Final = {"adamw": 0, "lion": 2, "muon": 6, "adafactor": 6}
"""Copies of the largest parameter that an update makes on the way."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Bytes of one process's tensors. activations: what one micro-batch keeps for backward; peak: the most in any step after the first."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    peak: int

    def table(self) -> list[tuple[str, str, str]]:
        """(what, how much, what it means)."""
        rest = self.peak - self.parameters - self.optimizer
        return [
            ("parameters", format_bytes(self.parameters), "master weights"),
            ("gradients", format_bytes(self.gradients), "of all parameters that are trained"),
            ("optimizer", format_bytes(self.optimizer), "its state"),
            ("activations", format_bytes(self.activations), "that one micro-batch keeps for backward"),
            ("peak", format_bytes(self.peak), f"the most at one time: parameters, optimizer, and {format_bytes(rest)} in a step"),
        ]


def predict(
    config: ModelConfig,
    lengths: Sequence[int],
    optimizer: str = "adamw",
    *,
    micro_batches: int = 1,
    plan: Sequence[Level] | None = None,
    compute_dtype: torch.dtype | None = None,
    beta1: bool = False,
) -> Prediction:
    """For one process that trains `config` on micro-batches of documents of these lengths (tokens), every target scored.

    plan: the checkpointing level of every block. beta1: whether Adafactor keeps a first moment. Nothing is computed, nothing allocated.
    """
    with ExitStack() as stack:
        stack.enter_context(FakeTensorMode())
        model = Decoder(config)
        apply_checkpointing(model, plan or ["none"] * config.num_layers)
        loss = _FakeLoss(model)
        parameters = list(model.parameters())
        size = sum(parameter.nbytes for parameter in parameters)
        alive = stack.enter_context(Alive(parameters))
        tokens = torch.zeros(sum(lengths), dtype=torch.int64)
        fixed = alive.bytes
        activations = 0
        for _ in range(min(2, micro_batches)):  # from the second on gradients are there already
            out = _run(loss, tokens, CausalAttend(lengths), compute_dtype)
            activations = max(activations, alive.bytes - fixed)
            out.backward()  # type: ignore[no-untyped-call]
            del out
            fixed = alive.bytes
        in_passes = alive.peak - size
    state = sum(_state_bytes(optimizer, name, parameter, beta1) for name, parameter in model.named_parameters())
    in_update = size + _STEP_COPIES[optimizer] * max(parameter.nbytes for parameter in parameters)
    return Prediction(size, size, state, activations, size + state + max(in_passes, in_update))


def _run(loss: nn.Module, tokens: Tensor, attend: CausalAttend, compute_dtype: torch.dtype | None) -> Tensor:
    """As `parallel.apply.Single`."""
    weights = {}
    if compute_dtype is not None:
        weights = {name: weight.to(compute_dtype) for name, weight in loss.named_parameters()}
    out: Tensor = torch.func.functional_call(loss, weights, (tokens, attend))
    return out


def _state_bytes(optimizer: str, name: str, parameter: nn.Parameter, beta1: bool) -> int:
    kind = algorithm(optimizer, name, parameter)
    if kind == "adafactor":
        factored = parameter.shape[:-1].numel() + parameter.shape[:-2].numel() * parameter.shape[-1]
        return 4 * (factored if parameter.dim() >= 2 else parameter.numel()) + beta1 * parameter.nbytes
    return {"adamw": 2, "lion": 1, "muon": 1}[kind] * parameter.nbytes


class _FakeLoss(nn.Module):
    """`parallel.apply.TokenLoss` with a head that allocates as the fused one does."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, attend: CausalAttend) -> Tensor:
        hidden = self.model.hidden(tokens, tokens, attend)
        out: Tensor = _FakeHead.apply(hidden, self.model.lm_head.weight, self.model.config.logit_softcap)  # type: ignore[no-untyped-call]
        return out


class _FakeHead(torch.autograd.Function):
    """The allocations of `loss.linear_cross_entropy`, whose own operations depend on which targets are scored."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, softcap: float | None) -> Tensor:
        grad_hidden = torch.zeros_like(hidden)
        grad_weight = torch.zeros(weight.shape, dtype=torch.float32)
        logits = torch.empty(min(CHUNK, len(hidden)), len(weight))  # [chunk, V], in place from there to its gradient
        if not in_one_loop(hidden, weight, softcap):
            logits = logits + 0  # and what logsumexp makes inside
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtype = weight.dtype
        return logits.sum()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden.mul_(upstream), grad_weight.mul_(upstream).to(ctx.dtype), None
