"""The published systems that can be reproduced, by name, and what a reproduction is."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Final

from armillary.core.errors import NotFoundError
from armillary.core.trace import Trace

_MODULES: Final = {
    "deja-vu": "armillary.reproduce.deja_vu",
    "distserve": "armillary.reproduce.distserve",
    "flexgen": "armillary.reproduce.flexgen",
    "nanoflow": "armillary.reproduce.nanoflow",
    "orca": "armillary.reproduce.orca",
    "paged-attention": "armillary.reproduce.paged_attention",
    "pope": "armillary.reproduce.pope",
    "sarathi": "armillary.reproduce.sarathi",
    "tail-at-scale": "armillary.reproduce.tail_at_scale",
    "tf-data": "armillary.reproduce.tf_data",
    "vidur": "armillary.reproduce.vidur",
}
"""Slug to the module whose EXPERIMENT it is."""


@dataclass(frozen=True, slots=True)
class Row:
    """A quantity, ours beside the published one. It holds when `low <= ours <= high`; `tolerance` says that in words, and why.

    `after`: the tolerance was set when ours had been seen. Otherwise it comes from what was published or was fixed before the first run.
    """

    quantity: str
    unit: str
    published: float
    source: str  # of the published figure
    ours: float
    low: float
    high: float
    tolerance: str
    after: bool = False

    @property
    def ratio(self) -> float | None:
        """Ours over the published one, where that is not 0."""
        return self.ours / self.published if self.published else None

    @property
    def holds(self) -> bool:
        return self.low <= self.ours <= self.high


@dataclass(frozen=True, slots=True)
class Result:
    """What a run gave: its rows, and traces for the picture, each with a title."""

    rows: tuple[Row, ...]
    pictures: tuple[tuple[str, Trace], ...] = ()

    @property
    def holds(self) -> bool:
        return all(row.holds for row in self.rows)


@dataclass(frozen=True, slots=True)
class Experiment:
    """A published system's headline experiment carried out, or in virtual time. `takes` is about how long `run` does."""

    name: str
    title: str
    paper: str
    claim: str
    setup: str
    takes: str
    run: Callable[[], Result]


def names() -> tuple[str, ...]:
    """The slugs, in the order of the listing."""
    return tuple(_MODULES)


def get(name: str) -> Experiment:
    """An experiment by its slug. Raises NotFoundError, with the closest slug."""
    if name not in _MODULES:
        close = difflib.get_close_matches(name, _MODULES, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]}?" if close else f"use one of: {', '.join(_MODULES)}"
        raise NotFoundError(f"nothing to reproduce is called {name[:80]!r}", hint)
    experiment: Experiment = import_module(_MODULES[name]).EXPERIMENT
    return experiment


def exactly(quantity: str, unit: str, published: float, source: str, ours: float) -> Row:
    """A row that holds only when ours is the published figure."""
    return Row(quantity, unit, published, source, ours, published, published, "exact")
