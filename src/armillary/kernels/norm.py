"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from armillary.kernels.training_library import call, operator, require, takes


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension; the sums are kept in float32.

    x: [..., d], weight: [d]. Gemma stores its weights around zero: `offset` 1.
    """
    weight = weight + offset if offset else weight
    if takes(x, weight) and x.shape[-1] % 16 == 0:
        normed: Tensor = _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
        return normed
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight. Starts as the plain normalisation."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor
        normed, inverse = _forward(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_backward(*ctx.saved_tensors, upstream), None


@operator(
    "rms_norm(Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)", lambda x, w, eps: (x.new_empty(x.shape), x.new_empty(x.shape[:-1]))
)
def _forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The result and 1 / sqrt(mean(x^2) + eps) of every row."""
    x, size = x.contiguous(), x.shape[-1]
    require(weight.shape == (size,) and size % 16 == 0, "the weight must have the last dimension's size", x, weight)
    normed, inverse = torch.empty_like(x), x.new_empty(x.shape[:-1])
    call("norm", inverse.numel(), size, eps, x, weight.contiguous(), normed, inverse)
    return normed, inverse


@operator(
    "rms_norm_backward(Tensor x, Tensor weight, Tensor inverse, Tensor upstream) -> (Tensor, Tensor)",
    lambda x, weight, inverse, upstream: (x.new_empty(x.shape), weight.new_empty(weight.shape)),
)
def _backward(x: Tensor, weight: Tensor, inverse: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, size = x.contiguous(), x.shape[-1]
    slope, weight_slope, partial = torch.empty_like(x), torch.empty_like(weight), x.new_empty(torch.get_num_threads(), size)
    call("norm_backward", inverse.numel(), size, x, weight.contiguous(), inverse, upstream.contiguous(), slope, weight_slope, partial)
    return slope, weight_slope
