"""The last linear layer and cross-entropy in one, a chunk of tokens at a time: no [tokens, vocabulary] tensor ever exists."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from armillary.kernels import token_loss
from armillary.kernels.training_library import library, plain
from armillary.train.microbatch import IGNORED

CHUNK = 512  # tokens: 100 MB of fp32 logits for SmolLM2's 49,152 entries; with half of it the products are 8 % slower


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None, chunk: int = CHUNK) -> Tensor:
    """Sum over the scored targets of -log softmax(hidden @ weight.T)[target], in float32. Memory beyond the gradients: O(chunk * V).

    hidden: [T, d], weight: [V, d], targets: [T] int64 (IGNORED is not scored). `softcap` c bounds the logits as c * tanh(logit / c).
    The gradients are made with the loss, where the logits are at hand, so the logits are computed once and never kept
    (the idea of Liger's fused linear cross-entropy, Hsu et al. 2024). Not differentiable twice.
    """
    total: Tensor = _LinearCrossEntropy.apply(hidden, weight, targets, softcap, chunk, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return total


def in_one_loop(hidden: Tensor, weight: Tensor, softcap: float | None) -> bool:
    """Whether `kernels.token_loss` computes the loss of these: one buffer of a chunk's logits then, else torch's operations with two."""
    return softcap is None and hidden.shape[-1] % 16 == 0 and plain(hidden, weight) and library() is not None


def plain_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None = None) -> Tensor:
    """The same in three lines with all logits at once: the reference. Shapes as in `linear_cross_entropy`."""
    logits = (hidden @ weight.T).float()
    logits = logits if softcap is None else torch.tanh(logits / softcap) * softcap
    return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int, training: bool) -> Tensor:
        rows = (targets != IGNORED).nonzero().flatten()
        part = slice(None) if len(rows) == len(targets) else rows
        scored, needed = (hidden[part], weight, targets[part]), [training and needs for needs in ctx.needs_input_grad[:2]]
        if in_one_loop(hidden, weight, softcap):
            total, grad_hidden, grad_weight = token_loss.linear_cross_entropy(*scored, chunk, needed)
        else:
            total, grad_hidden, grad_weight = _chunked(*scored, softcap, chunk, needed)
        if grad_hidden is not None and isinstance(part, Tensor):
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, part, grad_hidden)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.dtypes, ctx.spent = (hidden.dtype, weight.dtype), False
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError("a second backward pass through linear_cross_entropy: its gradients were handed out by the first")
        ctx.spent = True  # in place: a copy of the weight's gradient costs as much time as a layer
        gradients = (
            None if saved is None else saved.mul_(upstream).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *gradients, None, None, None, None


def _chunked(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, chunk: int, needed: Sequence[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The summed loss, and its gradients for hidden and weight where they are needed. Any dtype, any device. All targets count."""
    grad_hidden = torch.empty_like(hidden) if needed[0] else None
    # Summed over chunks in float32 whatever the weights are: a 16-bit sum of many chunks would swamp the small ones.
    grad_weight = torch.zeros(weight.shape, dtype=torch.float32, device=weight.device) if needed[1] else None
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(targets), chunk):
        part = slice(start, min(start + chunk, len(targets)))
        x, target = hidden[part], targets[part]
        logits = (x @ weight.T).float()  # [chunk, V]
        if softcap is not None:
            logits = logits.div_(softcap).tanh_().mul_(softcap)
        normaliser = logits.logsumexp(-1, keepdim=True)
        picked = logits.gather(-1, target[:, None])
        total += (normaliser - picked).sum()
        if grad_hidden is None and grad_weight is None:
            continue
        slope = None if softcap is None else (logits / softcap).square_().neg_().add_(1)
        grad = logits.sub_(normaliser).exp_()  # softmax, in place
        grad.scatter_add_(-1, target[:, None], torch.full_like(picked, -1.0))
        if slope is not None:
            grad.mul_(slope)
        grad = grad.to(x.dtype)
        if grad_hidden is not None:
            grad_hidden[part] = grad @ weight
        if grad_weight is not None and x.dtype == torch.float32:
            grad_weight.addmm_(grad.T, x)
        elif grad_weight is not None:
            grad_weight += (grad.T @ x).float()
    return total, grad_hidden, grad_weight
