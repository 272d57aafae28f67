"""Llama 3's rope scaling, which GGUF stores as one factor per rotated pair (`rope_freqs.weight`): the formula and its inverse.

Pair i turns with the frequency f_i = theta^(-2i/d), wavelength w_i = 2 pi / f_i. Its frequency is divided by 1 where w is below
original / high, by `factor` where w is above original / low, and in between by 1 / ((1 - s) / factor + s) with
s = (original / w - low) / (high - low) (Llama 3.1 model card and reference code).
"""

from __future__ import annotations

import math

import numpy as np

from armillary.core.errors import InputError
from armillary.models.config import RopeConfig


def llama3_factors(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [head_dim / 2]: what each pair's frequency is divided by."""
    wavelength = _wavelengths(rope.theta, head_dim)
    original = float(rope.original_context or 8192)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - smooth) / rope.factor + smooth)).astype(np.float32)


def fit_llama3(factors: np.ndarray, theta: float, head_dim: int, source: str) -> RopeConfig:
    """The parameters behind stored factors. `low_freq_factor` is 1: the formula depends on ratios only.

    Raises `InputError` when the factors are not of this form (Phi 3's long-rope factors, say).
    """
    factors = factors.astype(np.float64)
    if factors.shape != (head_dim // 2,) or not np.isfinite(factors).all() or (factors <= 0).any():
        raise InputError(f"{source}: rope_freqs.weight is not {head_dim // 2} positive factors", "fetch or convert the file again")
    if np.allclose(factors, 1.0, rtol=1e-6):
        return RopeConfig(theta=theta)
    factor = _rounded(float(factors.max()))
    for original, high in _candidates(factors, factor, _wavelengths(theta, head_dim)):
        rope = RopeConfig(theta=theta, kind="llama3", factor=factor, original_context=original, low_freq_factor=1.0, high_freq_factor=high)
        if np.allclose(llama3_factors(rope, head_dim), factors, rtol=1e-4):
            return rope
    raise InputError(f"{source}: rope_freqs.weight does not follow Llama 3's rope scaling", "other rope factors are not supported")


def _wavelengths(theta: float, head_dim: int) -> np.ndarray:
    return 2 * math.pi * theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def _candidates(factors: np.ndarray, factor: float, wavelength: np.ndarray) -> list[tuple[int, float]]:
    """(original context, high) pairs worth trying: the published one, then what the pairs between the two regimes say."""
    found = [(8192, 4.0)]
    kept, stretched = factors <= 1.0 + 1e-6, factors >= factor * (1 - 1e-6)
    between = ~kept & ~stretched
    if factor <= 1.0:
        return found
    smooth = (1.0 / factors[between] - 1.0 / factor) / (1.0 - 1.0 / factor)
    waves = wavelength[between]
    if between.sum() >= 2:  # s = original / (high - 1) / w - 1 / (high - 1) is a line in 1 / w
        slope, offset = np.polyfit(1.0 / waves, smooth, 1)
        if offset < 0:
            high = 1.0 - 1.0 / offset
            found += [(round(slope * (high - 1.0)), _rounded(high)), (round(slope * (high - 1.0)), high)]
    elif between.any():  # one point: take the published high, then the one that makes up for rounding the context
        original = round(float((smooth[0] * 3.0 + 1.0) * waves[0]))
        found += [(original, 4.0), (original, float(1.0 + (original / waves[0] - 1.0) / smooth[0]))]
    else:  # any step between the longest kept wave and the shortest stretched one
        longest = float(wavelength[kept].max()) if kept.any() else 0.0
        original = math.floor(wavelength[stretched].min())
        found.append((original, original / longest * (1 - 1e-6) if longest else 4.0))
    return [(original, high) for original, high in found if 1 <= original < 2**31 and high > 1.0]


def _rounded(value: float) -> float:
    return float(round(value)) if math.isclose(value, round(value), rel_tol=1e-5) else value
