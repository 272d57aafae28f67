"""Causal attention over packed sequences: what a decoder asks for, the differentiable version, and the plainest one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.causal_attention import causal_attention
from armillary.kernels.training_library import takes

QUERY_BLOCK = 512  # rows of scores held at once where the score matrix is formed: bounds memory, not the result


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """What one layer's attention is.

    `scale` multiplies the scores; `softcap` c then bounds them as c * tanh(score / c) (Gemma 2);
    `window` w lets position i see positions i-w+1 .. i (None: all up to i).
    """

    layer: int
    scale: float
    window: int | None = None
    softcap: float | None = None


class Attend(Protocol):
    """How a decoder's layer reaches its keys and values: packed sequences, a paged cache, ...

    q: [T, Hq, D], k and v: [T, Hkv, D], q and k rotated already; returns [T, Hq, D]. Hq is a multiple of Hkv,
    and query head h reads key/value head h // (Hq / Hkv).
    """

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor: ...


class CausalAttend:
    """An `Attend` over whole sequences laid end to end; `lengths` in tokens. For training and scoring."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = tuple(lengths)

    def __call__(self, spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return varlen_attention(spec, q, k, v, self.lengths)


def varlen_attention(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention of packed sequences, each to itself only. Differentiable, no padding.

    q: [T, Hq, D], k and v: [T, Hkv, D], T = sum(lengths). Returns [T, Hq, D]. Sequences of equal length
    run as one batch. Raises InputError when the lengths do not add up to T.
    """
    if sum(lengths) != q.shape[0] or min(lengths, default=0) < 0:
        raise InputError(f"lengths add up to {sum(lengths)} but there are {q.shape[0]} tokens", "give every packed sequence's length")
    everything = spec.softcap is None and (spec.window is None or spec.window >= max(lengths, default=0))
    if everything and q.shape[-1] % 16 == 0 and q.shape[0] and takes(q, k, v):
        return causal_attention(q, k, v, lengths, spec.scale)
    if len(set(lengths)) == 1 and q.shape[0]:
        q, k, v = (x.reshape(len(lengths), lengths[0], *x.shape[1:]) for x in (q, k, v))
        return _attend_batch(spec, q, k, v).flatten(0, 1)
    sizes = list(lengths)
    parts = zip(torch.split(q, sizes), torch.split(k, sizes), torch.split(v, sizes), strict=True)
    outputs = [_attend_batch(spec, a[None], b[None], c[None])[0] for a, b, c in parts if len(a)]
    return torch.cat(outputs) if outputs else torch.zeros_like(q)


def _attend_batch(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [B, L, Hq, D], k and v: [B, L, Hkv, D] of sequences that start at position 0. Returns [B, L, Hq, D]."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    length, grouped = q.shape[2], q.shape[1] != k.shape[1]
    window = spec.window if spec.window is not None and spec.window < length else None
    if spec.softcap is None and window is None:
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=spec.scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, start - window + 1)
        mask = _band(start, end, first, window, q.device)
        rows, keys, values = q[:, :, start:end], k[:, :, first:end], v[:, :, first:end]
        if spec.softcap is None:
            blocks.append(functional.scaled_dot_product_attention(rows, keys, values, mask, scale=spec.scale, enable_gqa=grouped))
        else:
            blocks.append(_softcapped(spec.scale, spec.softcap, rows, keys, values, mask))
    return torch.cat(blocks, dim=2).transpose(1, 2)


def _band(start: int, end: int, first: int, window: int | None, device: torch.device) -> Tensor:
    """True where query rows start .. end-1 may see keys first .. end-1. [end - start, end - first]."""
    distance = torch.arange(start, end, device=device)[:, None] - torch.arange(first, end, device=device)
    return distance >= 0 if window is None else (distance >= 0) & (distance < window)


def _softcapped(scale: float, softcap: float, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Scores bounded by tanh have no fused kernel in PyTorch. q: [B, Hq, R, D], k, v: [B, Hkv, K, D] -> [B, Hq, R, D]."""
    batch, _, rows, size = q.shape
    scores = q.reshape(batch, k.shape[1], -1, rows, size) @ k.mT[:, :, None]  # [B, Hkv, group, R, K]
    scores = torch.tanh(scores * (scale / softcap)) * softcap
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(v.dtype)
    return (weights @ v[:, :, None]).flatten(1, 2)


def reference_attention(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """The plainest loop, in float64: one query and one head at a time. Shapes as in `varlen_attention`."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[1] // k.shape[1]
    begin = 0
    for length in lengths:
        for i in range(length):
            first = 0 if spec.window is None else max(0, i - spec.window + 1)
            seen = slice(begin + first, begin + i + 1)
            for head in range(q.shape[1]):
                scores = k[seen, head // group].double() @ q[begin + i, head].double() * spec.scale
                if spec.softcap is not None:
                    scores = spec.softcap * torch.tanh(scores / spec.softcap)
                out[begin + i, head] = scores.softmax(0) @ v[seen, head // group].double()
        begin += length
    return out
