"""Speculative sampling: a draft drawn from q is accepted so that what stands in the end is drawn from p (Leviathan et al., ICML 2023, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor


def accepted(p: Tensor, q: Tensor, draft: int, u: float) -> bool:
    """Whether `draft`, drawn from q, may stand for a draw from p: with probability min(1, p / q). u is uniform in [0, 1)."""
    return u * float(q[draft]) < float(p[draft])


def recovered(p: Tensor, q: Tensor, u: float) -> int:
    """What stands in the place of a draft that was not accepted: a draw from what p has over q, normalised."""
    left = (p - q).clamp_(min=0)
    if not float(left.sum()):  # p and q differ by rounding alone
        left = p
    return drawn(left, u)


def drawn(law: Tensor, u: float) -> int:
    """The token at which the running sum of `law` (of any total) first exceeds u times the total."""
    mass = law.cumsum(0)
    place = int(torch.searchsorted(mass, u * float(mass[-1]), right=True))
    return min(place, int(law.nonzero()[-1]))  # a sum that rounding left below u
