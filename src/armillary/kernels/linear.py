"""Linear layers: one whose products are oneDNN's where torch's are slow, and several that read the same input, named apart."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from armillary.core.cpu import cpu_info, cpu_vendor
from armillary.kernels.training_library import call, library, operator, plain, require


class Linear(nn.Linear):
    """`torch.nn.Linear`; in training its three products (forward, and both gradients) are oneDNN's where `onednn_is_faster`."""

    def forward(self, input: Tensor) -> Tensor:
        training = self.training and torch.is_grad_enabled() and plain(input, self.weight, self.bias)
        fits = input.numel() and input.shape[-1] == self.in_features  # what does not is refused by torch, in better words than oneDNN's
        if training and fits and onednn_is_faster():
            y: Tensor = _OneDNNLinear.apply(input, self.weight, self.bias)  # type: ignore[no-untyped-call]
            return y
        return super().forward(input)


class FusedLinear(nn.Module):
    """Several projections of one input, e.g. q, k and v. `forward(x [..., in])` gives one tensor a name, in order.

    Every projection stays its own `Linear` child under its name, so checkpoints, optimisers, LoRA and
    tensor parallelism see it; serving replaces the whole module by one packed product with the same `forward`.
    """

    def __init__(self, names: Sequence[str], in_features: int, out_features: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.names = tuple(names)
        self.in_features = in_features
        self.out_features = tuple(out_features)
        for name, size in zip(self.names, self.out_features, strict=True):
            self.add_module(name, Linear(in_features, size, bias=bias))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(self._modules[name](x) for name in self.names)  # type: ignore[misc]


@functools.cache
def onednn_is_faster() -> bool:
    """Whether float32 products should not be torch's own: those are MKL's, which uses 512-bit vectors on Intel's processors alone.

    Measured on an AMD EPYC (Zen 5), a core: 100 GFLOP/s against oneDNN's 230, the kernels that torch has for half precision. A rule
    and not a measurement on the spot: ranks, and a run that is resumed, must add up in the same order.
    """
    return cpu_vendor() == "AuthenticAMD" and "avx512f" in cpu_info()[1] and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows, slope = x.reshape(-1, x.shape[-1]), upstream.reshape(-1, upstream.shape[-1])
        return (
            _product(slope, weight.T).view(x.shape) if needs_x else None,
            _product(_transposed(slope), rows.T) if needs_weight else None,
            slope.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def _transposed(x: Tensor) -> Tensor:
    """x.T laid out row after row, as oneDNN wants its first factor: torch's copy takes three times as long. x: [rows, columns]."""
    return _transpose(x) if plain(x) and library() is not None else x.T


@operator("transpose(Tensor x) -> Tensor", lambda x: x.new_empty(x.shape[::-1]))
def _transpose(x: Tensor) -> Tensor:
    require(x.ndim == 2, "a matrix is transposed", x)
    y = x.new_empty(x.shape[::-1])
    call("transpose", *x.shape, x.contiguous(), y)
    return y
