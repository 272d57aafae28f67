"""Closed forms of waiting: how rare slowness adds up, what hedging costs, and how long a prompt waits for one server or two.

Dean and Barroso, "The Tail at Scale" (CACM 2013); Zhong et al., DistServe (OSDI 2024), section 3. Seconds and requests a second.
"""

from __future__ import annotations

from collections.abc import Sequence

from armillary.core.errors import InputError


def any_slow(leaves: int, slow: float) -> float:
    """The chance that at least one of `leaves` answers is slow when each is with probability `slow`."""
    return 1.0 - (1.0 - slow) ** leaves


def hedged_share(waits: Sequence[float], threshold: float) -> float:
    """The share of requests that are sent twice when those without an answer after `threshold` are."""
    return sum(wait > threshold for wait in waits) / len(waits)


def first_token(prefill: float, rate: float) -> float:
    """Mean time to first token of one prefill server: M/D/1, D + R D^2 / (2 (1 - R D))."""
    return prefill + rate * prefill**2 / (2 * _idle(1.0, rate, prefill))


def first_token_pipelined(prefill: float, rate: float) -> float:
    """The same with the layers on two servers in turn, each half the time: D + R D^2 / (4 (2 - R D))."""
    return prefill + rate * prefill**2 / (4 * _idle(2.0, rate, prefill))


def first_token_sharded(prefill: float, rate: float, speedup: float) -> float:
    """The same with each layer on two servers at once, `speedup` times as fast: D/K + R D^2 / (2 K (K - R D))."""
    return prefill / speedup + rate * prefill**2 / (2 * speedup * _idle(speedup, rate, prefill))


def _idle(capacity: float, rate: float, prefill: float) -> float:
    """What is left of the capacity. Raises InputError when the queue would grow for ever."""
    if rate * prefill >= capacity:
        raise InputError(
            f"{rate:g} prompts a second of {prefill:g} s each are more than can be computed",
            f"stay under {capacity / prefill:g} a second, or add prefill workers",
        )
    return capacity - rate * prefill
