"""Rotary position embedding (Su et al. 2021) applied to queries and keys, in the half-split layout of Hugging Face."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.training_library import call, operator, plain, require, takes

FAR = 1 << 16  # a position from which on a float32 product of position and frequency is too coarse an angle


def rope_angles(positions: Tensor, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, once a forward pass for all layers.

    positions: [T] int64, or float64 where they are so far out that a product in float32 would lose them; inverse_frequencies: [D/2] float32. Returns two tensors [T, 1, D] in `dtype`; the first
    half of the sines is negative, so that a rotation is x * cos + swap_halves(x) * sin. Angles are float32
    whatever `dtype` is: position 8,191 has no neighbour in bfloat16.
    """
    if positions.is_floating_point():
        angles = (
            (positions.to(torch.float64)[:, None, None] * inverse_frequencies.to(torch.float64)).remainder(2 * math.pi).to(torch.float32)
        )
    else:
        angles = positions.to(torch.float32)[:, None, None] * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling != 1.0:
        cos, sin = cos * scaling, sin * scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q [T, Hq, D] and k [T, Hkv, D] by the angles of `rope_angles` (each [T, 1, D])."""
    learned = cos.requires_grad or sin.requires_grad  # the compiled rotation has no gradient for its angles
    if cos.shape[-1] % 32 == 0 and not learned and takes(q, k) and plain(cos, sin):
        return _Rope.apply(q, cos, sin), _Rope.apply(k, cos, sin)  # type: ignore[no-untyped-call]
    half = cos.shape[-1] // 2
    return torch.addcmul(q * cos, q.roll(half, -1), sin), torch.addcmul(k * cos, k.roll(half, -1), sin)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin, False)  # type: ignore[no-any-return]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        return _rotate(upstream, *ctx.saved_tensors, True), None, None


@operator("rope(Tensor x, Tensor cos, Tensor sin, bool transposed) -> Tensor", lambda x, cos, sin, transposed: x.new_empty(x.shape))
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, transposed: bool) -> Tensor:
    """The rotation, or (`transposed`) what the backward pass applies to its gradient."""
    x = x.contiguous()
    require(
        cos.shape == sin.shape == (x.shape[0], 1, x.shape[2]) and x.shape[2] % 32 == 0, "angles must be those of every token", x, cos, sin
    )
    rotated = torch.empty_like(x)
    call("rope", *x.shape, x, cos.contiguous(), sin.contiguous(), rotated, int(transposed))
    return rotated
