"""Cross-entropy over a vocabulary that is split between ranks: three numbers a token are exchanged, never the logits."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

CHUNK = 1024  # tokens whose logits exist at once


def vocabulary_parallel_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup, softcap: float | None = None, chunk: int = CHUNK
) -> Tensor:
    """Sum of cross-entropy over scored targets (Shoeybi et al. 2019, section 3), the same on every rank of `group`.

    hidden: [T, hidden], the same on all ranks; weight: [V_rank, hidden], the rows first .. first + V_rank - 1 of the
    head; targets: [T] int64 over the whole vocabulary, -100 where nothing is scored. Returns a float32 scalar.
    Backward gives this rank's share of hidden's gradient: the caller sums it over `group`.

    A chunk of tokens costs an all-reduce of its maxima and one of its sums and target logits: 12 bytes a token.
    Gradients are formed in forward, chunk by chunk, so that logits never outlive their chunk.
    """
    loss: Tensor = _CrossEntropy.apply(hidden, weight, targets, first, group, softcap, chunk)  # type: ignore[no-untyped-call]
    return loss


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, first: int, group: dist.ProcessGroup, softcap: float | None, chunk: int
    ) -> Tensor:
        want_hidden, want_weight = ctx.needs_input_grad[:2]
        grad_hidden = torch.zeros_like(hidden) if want_hidden else None
        # Summed over chunks in float32: in bfloat16 late chunks would vanish beside the sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if want_weight else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = hidden[start : start + chunk]
            wanted = targets[start : start + chunk]
            scored = (wanted >= 0).float()
            logits = (rows @ weight.mT).float()
            if softcap is not None:
                logits = torch.tanh(logits / softcap) * softcap
            maxima = logits.amax(-1)
            dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
            shifted = logits - maxima[:, None]
            column = wanted - first
            here = (column >= 0) & (column < weight.shape[0])
            column = torch.where(here, column, 0)[:, None]
            exponentials = shifted.exp()
            # [2, rows]: every rank's sum of exponentials, and the target's logit from the one rank that has it.
            sums = torch.stack((exponentials.sum(-1), shifted.gather(-1, column)[:, 0] * here))
            dist.all_reduce(sums, dist.ReduceOp.SUM, group)
            total += ((sums[0].log() - sums[1]) * scored).sum()
            if want_hidden or want_weight:
                gradient = exponentials / sums[0][:, None]
                gradient.scatter_add_(-1, column, -here[:, None].float())
                gradient *= scored[:, None]
                if softcap is not None:
                    gradient *= 1 - (logits / softcap).square()
                gradient = gradient.to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + chunk] = gradient @ weight
                if grad_weight is not None:
                    grad_weight += gradient.mT @ rows
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        hidden = None if grad_hidden is None else (grad_hidden * outer[0]).to(grad_hidden.dtype)
        weight = None if grad_weight is None else (grad_weight * outer[0]).to(ctx.weight_dtype)
        return hidden, weight, None, None, None, None, None
