"""What speculation is worth: the closed forms of Leviathan et al. (ICML 2023), with a = acceptance rate, g = drafted tokens, c = draft / target cost."""

from __future__ import annotations


def expected_tokens(a: float, g: int) -> float:
    """Tokens a pass of the target yields: (1 - a^(g+1)) / (1 - a), equation 1."""
    return float(g + 1) if a == 1.0 else (1.0 - a ** (g + 1)) / (1.0 - a)


def speedup(a: float, g: int, c: float) -> float:
    """Wall time without drafts over that with them, where verifying g + 1 tokens costs as much as computing one (theorem 3.8)."""
    return expected_tokens(a, g) / (g * c + 1.0)


def best_length(a: float, c: float, most: int = 64) -> int:
    """The g with the largest `speedup`; 0 where drafting does not pay."""
    return max(range(most + 1), key=lambda g: (speedup(a, g, c), -g))
