"""How an MLP's weights lie over a mesh of chips, and what that communicates (Pope et al., "Efficiently Scaling Transformer Inference", MLSys 2023).

Elements that each chip sends or receives for `tokens` tokens of width `hidden` through a layer `inner` wide on `chips` chips, in the paper's
limit of many: a collective over k chips carries (k - 1) / k of what these say.
"""

from __future__ import annotations

import math
from typing import Literal

Partition = Literal["1d weight-stationary", "2d weight-stationary", "weight-gathered"]


def stationary_1d(tokens: float, hidden: int) -> float:
    """Weights are split by `inner`; activations are gathered and reduced whole (Megatron)."""
    return 2.0 * tokens * hidden


def stationary_2d(tokens: float, hidden: int, inner: int, chips: int, split: float | None = None) -> float:
    """Weights are split by `hidden` over `split` chips and by `inner` over the others; by default as it moves least: 8 T E / sqrt(n) for F = 4 E."""
    x = best_split(hidden, inner, chips) if split is None else split
    return 2.0 * tokens * (hidden / x + inner * x / chips)


def best_split(hidden: int, inner: int, chips: int) -> float:
    """Over how many chips `hidden` is split where a 2D layout moves least: sqrt(n E / F), at least 1 and at most all."""
    return min(max(math.sqrt(chips * hidden / inner), 1.0), float(chips))


def gathered(tokens: float, hidden: int, inner: int, chips: int, over: float | None = None) -> float:
    """Weights are gathered over `over` chips, which split the tokens; by default as it moves least: 4 E sqrt(T F / n)."""
    n = best_gather(tokens, inner, chips) if over is None else over
    return 2.0 * hidden * inner * n / chips + 2.0 * tokens * hidden / n


def best_gather(tokens: float, inner: int, chips: int) -> float:
    """Over how many chips weights are gathered where that moves least: sqrt(T n / F), at least 1 and at most all."""
    return min(max(math.sqrt(tokens * chips / inner), 1.0), float(chips))


def best(tokens: float, hidden: int, inner: int, chips: int) -> tuple[Partition, float]:
    """The partition that moves least, and how much; of equals the one named first."""
    moved: dict[Partition, float] = {
        "1d weight-stationary": stationary_1d(tokens, hidden),
        "2d weight-stationary": stationary_2d(tokens, hidden, inner, chips),
        "weight-gathered": gathered(tokens, hidden, inner, chips),
    }
    name = min(moved, key=lambda one: moved[one])
    return name, moved[name]
