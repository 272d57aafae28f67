"""How many tokens to draft for each sequence: as many as make the batch's tokens a second the most."""

from __future__ import annotations

import math
from collections.abc import Sequence


def best_lengths(acceptance: Sequence[float], most: Sequence[int], *, fixed: float, per_token: float, per_draft: float) -> list[int]:
    """Draft lengths for a batch of decodes, each at most `most[i]`.

    An iteration costs `fixed` + `per_token` for every token it computes, and every proposed token costs `per_draft` before it
    (any unit of time). The k-th draft of a sequence adds `acceptance[i]` ** k tokens. The rate tokens / time is a sum of
    concave gains over a sum of costs, so at its maximum a draft is in exactly when its gain over its cost is at least the rate
    itself (Dinkelbach 1967); from the rate without drafts a few rounds of that lead there.
    """
    count = len(acceptance)
    if not count:
        return []
    cost = per_token + per_draft
    lengths = [0] * count
    while True:
        gained = sum(_gained(rate, length) for rate, length in zip(acceptance, lengths, strict=True))
        rate = (count + gained) / (fixed + per_token * count + cost * sum(lengths))
        better = [_worth(rate * cost, accepted, bound) for accepted, bound in zip(acceptance, most, strict=True)]
        if better == lengths:
            return lengths
        gains = sum(_gained(accepted, length) for accepted, length in zip(acceptance, better, strict=True))
        if (count + gains) / (fixed + per_token * count + cost * sum(better)) <= rate:
            return lengths
        lengths = better


def _gained(acceptance: float, length: int) -> float:
    """Tokens that `length` drafts are expected to add."""
    return float(length) if acceptance >= 1.0 else acceptance * (1.0 - acceptance**length) / (1.0 - acceptance)


def _worth(threshold: float, acceptance: float, most: int) -> int:
    """How many k have acceptance ** k >= threshold."""
    if threshold <= 0.0 or acceptance >= 1.0:
        return most if threshold <= 1.0 else 0
    if threshold > acceptance:
        return 0
    return min(most, math.floor(math.log(threshold) / math.log(acceptance) + 1e-9))
