"""A loss or a gradient that is no number: which step, and what caused it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch

from armillary.core.errors import ArmillaryError
from armillary.train.microbatch import MicroBatch

if TYPE_CHECKING:
    from armillary.train.parallel.apply import Parallel


GROWN: Final = 1e5
"""A weight of this size is no longer one of a network that learns: they start around 0.02."""


class DivergenceError(ArmillaryError):
    """Training cannot go on from here."""


def diagnose(parallel: Parallel, batch: Sequence[MicroBatch], step: int, loss: float, norm: float, learning_rate: float) -> DivergenceError:
    """The error for a step whose loss or gradient is not finite, with what this rank can see of the cause. Nothing has been updated yet."""
    where = f"step {step}: the loss is {loss:g} and the gradient's norm {norm:g}"
    bad = [name for name, parameter in parallel.named_parameters() if not _finite(parameter)]
    if bad:
        return DivergenceError(
            f"{where}, because the weights are no numbers any more ({bad[0]} and {len(bad) - 1} others)",
            f"an earlier step was too large: lower optimizer.lr (now {learning_rate:g}), warm up longer, or clip",
        )
    size, largest = max((_largest(parameter), name) for name, parameter in parallel.named_parameters())
    if size > GROWN:
        return DivergenceError(
            f"{where}, because the weights have grown out of bounds (the largest is {size:.1e}, in {largest})",
            f"earlier steps were too large: lower optimizer.lr (now {learning_rate:g}) or optimizer.weight_decay, or warm up longer",
        )
    gradients = [name for name, p in parallel.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if loss == loss and abs(loss) != float("inf") and gradients:
        return DivergenceError(
            f"{where}: the gradient of {gradients[0]} ({len(gradients)} such) is not finite although weights and loss are",
            "train in fp32 or bf16, or look at that layer",
        )
    ranges = ", ".join(f"{int(part.tokens.min())}..{int(part.tokens.max())}" for part in batch[:4] if len(part.tokens))
    return DivergenceError(
        f"{where} although all weights are finite: activations overflow (token ids of its micro-batches: {ranges})",
        f"lower optimizer.lr (now {learning_rate:g}), warm up longer, or compute in fp32",
    )


def _largest(tensor: torch.Tensor) -> float:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return float(local.detach().abs().max()) if local.numel() else 0.0


def _finite(tensor: torch.Tensor) -> bool:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return bool(torch.isfinite(local).all())
