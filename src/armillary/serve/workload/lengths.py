"""How long prompts and answers are: fitted to published traces, fixed, or read from a file."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from math import erfc
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError, NotFoundError

_BATCH = 4096
_RANKS: Final = (*(step / 100 for step in range(99)), *(step / 1000 for step in range(990, 1001)))
"""Where the quantiles stand: the last hundredth, which is long, has ten."""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of prompts and answers by their quantiles at `_RANKS`, and how their ranks correlate.

    A pair is drawn through two correlated normals (a Gaussian copula): both distributions are the trace's, so is Spearman's rank correlation.
    `rate` and `variation` are the trace's arrivals, requests a second and coefficient of variation of the gaps, where it has them.
    """

    name: str
    prompt: tuple[float, ...]
    answer: tuple[float, ...]
    correlation: float = 0.0  # Spearman's
    source: str = ""
    rate: float | None = None
    variation: float | None = None

    def draw(self, seed: int = 0, limit: int | None = None) -> Iterator[tuple[int, int]]:
        """(prompt, answer) tokens, endless. With `limit` both together are at most so many: the answer is cut, then the prompt."""
        generator = np.random.default_rng(seed)
        rho = 2 * np.sin(np.pi / 6 * self.correlation)  # Pearson's of the normals whose ranks correlate by `correlation`
        while True:
            one, other = generator.standard_normal((2, _BATCH))
            ranks = _normal(one), _normal(rho * one + np.sqrt(1 - rho**2) * other)
            prompts, answers = (
                np.maximum(1, np.rint(np.interp(rank, _RANKS, values))).astype(np.int64)
                for rank, values in zip(ranks, (self.prompt, self.answer), strict=True)
            )
            if limit is not None:
                prompts = np.minimum(prompts, limit - 1)
                answers = np.minimum(answers, limit - prompts)
            yield from zip(prompts.tolist(), answers.tolist(), strict=True)


def fixed(prompt: int, answer: int) -> Lengths:
    """All alike."""
    if prompt < 1 or answer < 1:
        raise InputError(f"prompts of {prompt} and answers of {answer} tokens", "give at least 1 of each", field="lengths")
    return Lengths(f"{prompt}+{answer}", (prompt,) * len(_RANKS), (answer,) * len(_RANKS))


def fitted(name: str, prompts: NDArray[np.int64], answers: NDArray[np.int64], source: str = "") -> Lengths:
    """The distribution that pairs of lengths come from. [requests], [requests]"""
    ranks = [np.argsort(np.argsort(values, kind="stable"), kind="stable") for values in (prompts, answers)]
    correlation = float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if len(prompts) > 1 and np.ptp(ranks[0]) else 0.0
    at = [tuple(np.quantile(values, _RANKS).tolist()) for values in (prompts, answers)]
    return Lengths(name, at[0], at[1], correlation, source)


def named(text: str) -> Lengths:
    """By published name, or `PROMPT+ANSWER` tokens for all alike. Raises NotFoundError or InputError."""
    both = alike(text)
    return fixed(*both) if both is not None else published(text.strip())


def alike(text: str) -> tuple[int, int] | None:
    """(prompt, answer) where it says `PROMPT+ANSWER`."""
    both = re.fullmatch(r"([0-9]{1,7})\+([0-9]{1,7})", text.strip())
    return (int(both[1]), int(both[2])) if both is not None else None


def names() -> tuple[str, ...]:
    """The published distributions."""
    return tuple(_table())


def published(name: str) -> Lengths:
    """By name. Raises NotFoundError."""
    table = _table()
    if name not in table:
        raise NotFoundError(
            f"no published lengths are called '{name}'",
            f"use one of: {', '.join(table)}, or PROMPT+ANSWER such as 512+128",
            field="lengths",
        )
    return table[name]


@cache
def _table() -> dict[str, Lengths]:
    text = resources.files("armillary.serve.workload").joinpath("published.toml").read_text("utf-8")
    return {
        name: Lengths(
            name, tuple(one["prompt"]), tuple(one["answer"]), one["correlation"], one["source"], one.get("rate"), one.get("variation")
        )
        for name, one in tomllib.loads(text).items()
    }  # fmt: skip


def _normal(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The standard normal's distribution function."""
    return np.array([0.5 * erfc(value) for value in (values * -(0.5**0.5)).tolist()])
