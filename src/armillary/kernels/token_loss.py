"""The last linear layer, softmax cross-entropy and both their gradients in one compiled loop over chunks of tokens."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from armillary.kernels.training_library import call, operator, require


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int, needed: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Sum of -log softmax(hidden @ weight.T)[target], and its gradients for hidden and weight where `needed`. All targets count.

    hidden: [T, d], d a multiple of 16, weight: [V, d], targets: [T] int64 in [0, V), else IndexError. Scratch space: a chunk of logits.
    Not differentiable; only for what `training_library.plain` says, with its `library()`.
    """
    logits = hidden.new_empty(weight.shape[0] * _padded(min(chunk, hidden.shape[0])))
    total, *slopes = _run(hidden, weight, targets, logits, chunk, *needed)
    of_hidden, of_weight = (slope if wanted else None for slope, wanted in zip(slopes, needed, strict=True))
    return total, of_hidden, of_weight


def _padded(tokens: int) -> int:
    return -(-tokens // 16) * 16


@operator(
    "linear_cross_entropy(Tensor hidden, Tensor weight, Tensor targets, Tensor(a!) logits, int chunk, bool slope, bool weight_slope)"
    " -> (Tensor, Tensor, Tensor)",
    lambda hidden, weight, targets, logits, chunk, slope, weight_slope: (
        hidden.new_empty(()),
        hidden.new_empty(hidden.shape if slope else (0,)),
        hidden.new_empty(weight.shape if weight_slope else (0,)),
    ),
)
def _run(
    hidden: Tensor, weight: Tensor, targets: Tensor, logits: Tensor, chunk: int, slope: bool, weight_slope: bool
) -> tuple[Tensor, Tensor, Tensor]:
    (tokens, size), vocabulary = hidden.shape, weight.shape[0]
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    fits = weight.shape == (vocabulary, size) and targets.shape == (tokens,) and size > 0 and size % 16 == 0 and chunk > 0
    room = logits.numel() >= vocabulary * _padded(min(chunk, tokens)) and targets.dtype == torch.int64
    require(fits and room, "hidden, weight, targets and logits must belong to one loss", hidden, weight, targets, logits)
    chunk = min(chunk, max(1, tokens))  # the loop counts in 32 bits
    if tokens and not 0 <= int(targets.min()) <= int(targets.max()) < vocabulary:
        raise IndexError(f"a target is outside the vocabulary of {vocabulary}")  # as torch's cross_entropy
    of_hidden = hidden.new_empty(hidden.shape if slope else (0,))
    of_weight = hidden.new_zeros((0,)) if not weight_slope else torch.empty_like(weight) if tokens else torch.zeros_like(weight)
    total = ctypes.c_double()
    slopes = of_hidden if slope else None, of_weight if weight_slope else None
    call("cross_entropy", tokens, size, vocabulary, chunk, hidden, weight, targets.data_ptr(), logits, *slopes, ctypes.addressof(total))
    return hidden.new_tensor(total.value), of_hidden, of_weight
