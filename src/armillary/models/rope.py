"""Rotary frequencies of a model: the scaling kinds that stretch a trained context."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.rope import rope_angles
from armillary.models.config import RopeConfig


class Rope:
    """Angles of positions for one `RopeConfig`. Not a module: its frequencies stay float32 when a model is cast.

    Angles are computed from the positions once a forward pass (one outer product for all layers), not looked up:
    a table would hold 2 * context * head_dim numbers, and would end where the context ends.
    """

    def __init__(self, config: RopeConfig, head_dim: int) -> None:
        self.config = config
        self.head_dim = head_dim
        self.scaling = attention_scaling(config)
        self._frequencies: dict[torch.device, Tensor] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """positions [T] int64 (or float64: `rope_angles`) -> cosines and signed sines for `apply_rope`, each [T, 1, head_dim]."""
        frequencies = self._frequencies.get(positions.device)
        if frequencies is None:
            with torch.inference_mode(False), torch.no_grad():  # a tensor made in inference mode could not train later
                frequencies = inverse_frequencies(self.config, self.head_dim).to(positions.device)
            self._frequencies[positions.device] = frequencies
        return rope_angles(positions, frequencies, self.scaling, dtype)


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians a position for each pair of dimensions: theta^(-2i/D), rescaled as `rope.kind` says. [D/2] float32."""
    with torch.device("cpu"):
        frequencies = 1.0 / (rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if rope.kind == "linear":
            return frequencies / rope.factor
        if rope.kind == "llama3":
            return _llama3(rope, frequencies)
        if rope.kind == "yarn":
            return _yarn(rope, frequencies, head_dim)
    return frequencies


def attention_scaling(rope: RopeConfig) -> float:
    """What cosines and sines are multiplied by: YaRN's temperature (Peng et al. 2023, section 3.4), else 1."""
    if rope.kind != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _temperature(rope.factor, rope.mscale) / _temperature(rope.factor, rope.mscale_all_dim)
    return _temperature(rope.factor, 1.0)


def _temperature(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _original_context(rope: RopeConfig) -> int:
    if rope.original_context is None:
        raise InputError(f"{rope.kind} rope scaling has no original_context", "give the context that the model was trained with")
    return rope.original_context


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Llama 3.1: waves longer than the trained context are stretched, short ones kept, those between blended."""
    turns = _original_context(rope) * frequencies / (2 * math.pi)  # full turns within the trained context
    kept = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
    return kept * frequencies + (1 - kept) * frequencies / rope.factor


def _yarn(rope: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """YaRN's NTK-by-parts (Peng et al. 2023, section 3.2): a ramp over dimensions between beta_fast and beta_slow turns."""
    context = _original_context(rope)

    def dimension(turns: float) -> float:
        return head_dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return frequencies * (1 - stretched) + frequencies / rope.factor * stretched
