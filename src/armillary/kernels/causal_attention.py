"""Causal attention of packed sequences with its backward pass, in compiled loops: no score matrix larger than a block of rows."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from armillary.kernels.training_library import call, operator, require


def causal_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """softmax(scale q k^T) v of each sequence, causal. q: [T, Hq, D], k, v: [T, Hkv, D], D a multiple of 16; lengths sum to T.

    Differentiable (once); keeps its inputs, its result and a number a row. Only for what `training_library.takes`.
    """
    out: Tensor = _CausalAttention.apply(q, k, v, list(lengths), scale)  # type: ignore[no-untyped-call]
    return out


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> Tensor:
        out: Tensor
        out, normaliser = _forward(q, k, v, lengths, scale)
        ctx.save_for_backward(q, k, v, out, normaliser)
        ctx.lengths, ctx.scale = lengths, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return *_backward(*ctx.saved_tensors, upstream, ctx.lengths, ctx.scale), None, None


@operator(
    "causal_attention(Tensor q, Tensor k, Tensor v, int[] lengths, float scale) -> (Tensor, Tensor)",
    lambda q, k, v, lengths, scale: (q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0])),
)
def _forward(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """The result, and the log of every row's sum of exponentials, [Hq, T]."""
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    tokens, heads, size = q.shape
    fits = k.shape == v.shape == (tokens, k.shape[1], size) and k.shape[1] > 0 and heads % k.shape[1] == 0 and size % 16 == 0
    require(
        fits and sum(lengths) == tokens and min(lengths, default=0) >= 0, f"q, k and v must share tokens {lengths} and head sizes", q, k, v
    )
    out, normaliser = torch.empty_like(q), q.new_empty(heads, tokens)
    call("attention", tokens, heads, k.shape[1], size, scale, len(lengths), _array(lengths), q, k, v, out, normaliser)
    return out, normaliser


@operator(
    "causal_attention_backward(Tensor q, Tensor k, Tensor v, Tensor out, Tensor normaliser, Tensor upstream, int[] lengths, float scale)"
    " -> (Tensor, Tensor, Tensor)",
    lambda q, k, v, out, normaliser, upstream, lengths, scale: (q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)),
)
def _backward(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, normaliser: Tensor, upstream: Tensor, lengths: list[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, upstream = (x.contiguous() for x in (q, k, v, out, upstream))
    tokens, heads, size = q.shape
    slopes = torch.empty_like(q), torch.empty_like(q), torch.empty_like(q)  # those of k and v once for each query head
    shape = (tokens, heads, k.shape[1], size, scale, len(lengths))
    call("attention_backward", *shape, _array(lengths), q, k, v, out, normaliser, upstream, *slopes)
    if heads == k.shape[1]:
        return slopes
    of_k, of_v = (slope.view(tokens, k.shape[1], -1, size).sum(2) for slope in slopes[1:])
    return slopes[0], of_k, of_v


def _array(lengths: list[int]) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * len(lengths))(*lengths)
