"""The gate of a feed-forward layer (Shazeer 2020): SwiGLU, GeGLU with the tanh approximation, or ReGLU, most of whose products are zero."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from armillary.kernels.activations import Activation
from armillary.kernels.training_library import call, operator, require, takes


def gated(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """activation(gate) * up. Both of one shape."""
    if activation == "silu" and gate.shape == up.shape and takes(gate, up):
        out: Tensor = _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call]
        return out
    return activate(gate, activation) * up


def activate(x: Tensor, activation: Activation) -> Tensor:
    if activation == "relu":
        return functional.relu(x)
    return functional.gelu(x, approximate="tanh") if activation == "gelu_tanh" else functional.silu(x)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor]:
        return _backward(*ctx.saved_tensors, upstream)  # type: ignore[no-any-return]


@operator("swiglu(Tensor gate, Tensor up) -> Tensor", lambda gate, up: gate.new_empty(gate.shape))
def _forward(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    require(gate.shape == up.shape, "gate and up must have one shape", gate, up)
    out = torch.empty_like(gate)
    call("swiglu", out.numel(), gate, up, out)
    return out


@operator(
    "swiglu_backward(Tensor gate, Tensor up, Tensor upstream) -> (Tensor, Tensor)",
    lambda gate, up, upstream: (gate.new_empty(gate.shape), up.new_empty(up.shape)),
)
def _backward(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = gate.contiguous(), up.contiguous()
    gate_slope, up_slope = torch.empty_like(gate), torch.empty_like(up)
    call("swiglu_backward", gate.numel(), gate, up, upstream.contiguous(), gate_slope, up_slope)
    return gate_slope, up_slope
