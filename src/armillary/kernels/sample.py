"""One token drawn from a row of logits: temperature, then top-k, then top-p over what is left, then min-p.

The law, the same in torch (`reference`) and in C++ (`cpu/sample.cpp`, which sorts nothing):

    x = (logit - peak) / temperature in fp32; a token's weight is the integer nearest to exp(x) 2^44
    heavier comes before lighter, and of equal logits the lower token first
    top-k   keeps the first k
    top-p   keeps a token when those before it weigh less than top_p of all that top-k left (Holtzman et al. 2020)
    min-p   keeps a token of at least min_p times the weight of the best
    draw    the kept token, in order of tokens, at which the running sum of weights first exceeds u times their total

Integers make sums exact, so the result does not depend on the order of additions. What is less likely than the best by more
than 2^45 has weight zero and is never drawn.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from armillary.core.errors import CapacityError, InputError
from armillary.kernels.cpu_library import library

ONE = 1 << 44
MAX_VOCABULARY = (1 << 63) // ONE - 1  # the sum of all weights must fit 63 bits
_LIKELY = math.log(1e-4)  # top-p sorts tokens down to 1e-4 of the best, and all only when they do not suffice


def draw(row: Tensor, peak: float, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """The token that `u` in [0, 1) draws from `row` [vocabulary] fp32, whose largest logit is `peak`, by the native kernel.

    top_k: 0 switches it off. Falls back on `reference` where there is no kernel. Raises InputError for a vocabulary of more
    than `MAX_VOCABULARY`, CapacityError when there is no memory.
    """
    lib = library() if row.device.type == "cpu" and row.dtype == torch.float32 and row.is_contiguous() else None
    if lib is None:
        return reference(row, peak, temperature, top_k, top_p, min_p, u)
    size = _vocabulary(row)
    token: int = lib.arm_sample(row.data_ptr(), size, peak, temperature, min(top_k, size) if top_k > 0 else size, top_p, min_p, u)
    if token < 0:
        raise CapacityError(f"no memory to sample from {size:,} tokens", "close something")
    return token


def reference(row: Tensor, peak: float, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    """The same in plain torch, on the row's device."""
    mass = weights_of(row, peak, temperature, top_k, top_p, min_p).cumsum(0)
    total = int(mass[-1])
    return int(torch.searchsorted(mass, min(int(u * total), total - 1), right=True))


def weights_of(row: Tensor, peak: float, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """What each token weighs in the draw: int64 [vocabulary]. Over their sum they are its distribution."""
    size = _vocabulary(row)
    x = (row.float() - peak) / temperature  # in this order: a tiny temperature must not turn large logits into infinities
    weights = (x.double().exp() * ONE).round().long()
    if 0 < top_k < size:
        edge = x.topk(top_k).values[-1]
        kept = x > edge
        ties = (x == edge).nonzero().squeeze(1)
        kept[ties[: top_k - int(kept.sum())]] = True
        weights = weights.where(kept, 0)
    if top_p < 1.0:
        total = int(weights.sum())
        limit = min(total, math.ceil(top_p * float(total)))
        for floor in (_LIKELY, -math.inf):
            tokens = ((x >= floor) & (weights > 0)).nonzero().squeeze(1)
            tokens = tokens[x[tokens].sort(descending=True, stable=True).indices]
            mass = weights[tokens].cumsum(0)
            if int(mass[-1]) >= limit:
                break
        tokens = tokens[mass - weights[tokens] < limit]
        weights = torch.zeros_like(weights).index_copy(0, tokens, weights[tokens])
    if min_p > 0.0:
        weights = weights.where(weights >= math.ceil(min_p * ONE), 0)
    return weights


def _vocabulary(row: Tensor) -> int:
    if row.shape[0] > MAX_VOCABULARY:
        raise InputError(f"a vocabulary of {row.shape[0]:,} is more than the {MAX_VOCABULARY:,} tokens that can be sampled from")
    return row.shape[0]
