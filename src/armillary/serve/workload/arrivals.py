"""When requests come: instants in ns, from a rate and a seed. Each is an endless iterator, so that a workload need not be in memory."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from armillary.core.errors import InputError
from armillary.core.units import S

_BATCH = 4096  # gaps drawn at once
_END = 1 << 62  # ns, 146 years: times are 64 bits wide


def steady(rate: float) -> Iterator[int]:
    """One every 1 / `rate` s."""
    gap, place = S / _checked(rate), 0
    while True:
        place += 1
        yield round(gap * place)


def poisson(rate: float, seed: int = 0) -> Iterator[int]:
    """Independent of each other, `rate` a second on average: exponential gaps."""
    return bursty(rate, 1.0, seed)


def bursty(rate: float, variation: float, seed: int = 0) -> Iterator[int]:
    """Gamma-distributed gaps of coefficient of variation `variation`: 1 is Poisson, more comes in bursts, less is more regular (Vidur, DistServe)."""
    mean = S / _checked(rate)
    if not 1e-3 <= variation <= 1e3:
        raise InputError(
            f"a coefficient of variation of {variation:g} is outside 0.001 .. 1000", "1 is a Poisson process", field="variation"
        )
    generator, shape, now = np.random.default_rng(seed), 1 / variation**2, 0.0
    while True:
        for gap in generator.gamma(shape, mean / shape, _BATCH).tolist():
            now += gap
            if now >= _END:
                raise InputError(f"at {rate:g} requests a second the next comes in over a century", "give a higher rate", field="rate")
            yield round(now)


def _checked(rate: float) -> float:
    if not (math.isfinite(rate) and rate > 0):
        raise InputError(f"{rate:g} requests a second is no rate", "give more than 0, such as --rate 2", field="rate")
    return rate
