"""Rotary position embedding (Su et al. 2021) applied to queries and keys, in the half-split layout of Hugging Face."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, inverse_frequencies: Tensor, scaling: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of every position, once a forward pass for all layers.

    positions: [T] int64; inverse_frequencies: [D/2] float32. Returns two tensors [T, 1, D] in `dtype`; the first
    half of the sines is negative, so that a rotation is x * cos + swap_halves(x) * sin. Angles are float32
    whatever `dtype` is: position 8,191 has no neighbour in bfloat16.
    """
    angles = positions.to(torch.float32)[:, None, None] * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    if scaling != 1.0:
        cos, sin = cos * scaling, sin * scaling
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def apply_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotates q [T, Hq, D] and k [T, Hkv, D] by the angles of `rope_angles` (each [T, 1, D])."""
    half = cos.shape[-1] // 2
    return torch.addcmul(q * cos, q.roll(half, -1), sin), torch.addcmul(k * cos, k.roll(half, -1), sin)
