"""Root-mean-square normalisation (Zhang & Sennrich 2019)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * (weight + offset) over the last dimension; the sums are kept in float32.

    x: [..., d], weight: [d]. Gemma stores its weights around zero: `offset` 1.
    """
    return functional.rms_norm(x, (x.shape[-1],), weight + offset if offset else weight, eps)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight. Starts as the plain normalisation."""

    def __init__(self, size: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, self.offset)
