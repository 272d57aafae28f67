"""Closed forms of parallel training: bytes of memory a rank and bytes on the wire a step. What tests count against."""

from __future__ import annotations

from typing import Literal

ZeroStage = Literal[0, 1, 2, 3]


def zero_bytes(parameters: int, ranks: int, stage: ZeroStage, weight: int = 2, gradient: int = 2, optimizer: int = 12) -> float:
    """Bytes of model state a rank (Rajbhandari et al. 2020, figure 1); stage 0 is plain data parallelism.

    The paper's mixed-precision Adam: 2 bytes a weight, 2 a gradient, 12 of float32 master weight and two moments.
    7.5e9 parameters on 64 ranks: 120, 31.4, 16.6 and 1.88 GB.
    """
    share = [1 / ranks if stage >= wanted else 1.0 for wanted in (3, 2, 1)]
    return parameters * (weight * share[0] + gradient * share[1] + optimizer * share[2])


def zero_elements(parameters: int, stage: ZeroStage, ranks: int) -> float:
    """Elements that a rank sends a step, ring collectives: 2 a parameter up to stage 2, 3 with stage 3, times (N-1)/N.

    Up to stage 2 a reduce-scatter of gradients and an all-gather of parameters (together an all-reduce); stage 3
    gathers parameters twice, for forward and for backward.
    """
    return (3 if stage == 3 else 2) * parameters * (ranks - 1) / ranks


def ring_bytes(operation: Literal["all_reduce", "all_gather", "reduce_scatter"], size: float, ranks: int) -> float:
    """Bytes that each rank sends in a ring collective. `size`: bytes of the whole tensor (gathered, or before scattering)."""
    return (2 if operation == "all_reduce" else 1) * size * (ranks - 1) / ranks


def ddp_bytes(gradient_bytes: float, ranks: int) -> float:
    """Bytes that each rank sends a step under data parallelism: one all-reduce of the gradients."""
    return ring_bytes("all_reduce", gradient_bytes, ranks)


def tensor_parallel_layer_bytes(tokens: int, hidden: int, ranks: int, element: int) -> float:
    """Bytes that each rank sends for one layer's forward, and again for its backward: two all-reduces of [tokens, hidden].

    With sequence parallelism each becomes a reduce-scatter and an all-gather: the same bytes.
    """
    return 2 * ring_bytes("all_reduce", tokens * hidden * element, ranks)


def vocabulary_parallel_loss_bytes(tokens: int, ranks: int) -> float:
    """Bytes that each rank sends for the loss: a maximum, a sum and a target logit a token, in float32."""
    return ring_bytes("all_reduce", 3 * 4 * tokens, ranks)
