"""A sum of curves through what was measured of an engine on a machine: this is how long *this* engine takes *here*."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch
from armillary.sim.costs.model import whole, whole_one


class Curve:
    """Straight lines from point to point; beyond the last one the line goes on, before the first one it stays."""

    def __init__(self, at: Iterable[float], values: Iterable[float]) -> None:
        """At least one point, rising `at`."""
        self.at, self.values = [float(x) for x in at], [float(y) for y in values]
        pairs = list(zip(self.at, self.values, strict=True))
        slopes = [(y - before) / (x - left) for (left, before), (x, y) in pairwise(pairs)]
        self.slopes = slopes or [0.0]
        self._last = len(self.slopes) - 1
        self._at, self._values, self._slopes = (np.array(part) for part in (self.at, self.values, self.slopes))

    def __call__(self, x: float) -> float:
        x = max(x, self.at[0])
        place = min(bisect_right(self.at, x) - 1, self._last)
        return self.values[place] + self.slopes[place] * (x - self.at[place])

    def many(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """The same of each, by the same operations and so to the last bit."""
        x = np.maximum(x, self._at[0])
        place = np.minimum(np.searchsorted(self._at, x, side="right") - 1, self._last)
        found: NDArray[np.float64] = self._values[place] + self._slopes[place] * (x - self._at[place])
        return found


@dataclass(frozen=True, slots=True)
class Errors:
    """|predicted - measured| / measured over `samples` that took no part in the fit."""

    samples: int
    median: float
    p90: float
    worst: float

    def __str__(self) -> str:
        return f"{self.median:.1%} median, {self.p90:.1%} at the 90th percentile, {self.worst:.0%} at worst, of {self.samples} left out"


@dataclass(frozen=True, slots=True)
class Host:
    """ns beside the executor: an iteration's schedule, its batch and its tokens, and more for each sequence and each piece of a prompt."""

    fixed: float = 0.0
    per_sequence: float = 0.0
    per_prompt: float = 0.0

    def of(self, batch: Batch) -> float:
        """ns of a batch."""
        return self.fixed + self.per_sequence * batch.sequences + self.per_prompt * len(batch.prompts)


class Fitted:
    """ns of an iteration: linear layers by their tokens, the head by its rows, attention of prompts and of decodes, and the host.

    `tokens` and `rows` are ns by count. `pairs` is ns a (query, key) pair by the queries of a prompt's piece, of which q after c computed
    tokens have q (c + (q + 1) / 2). `decodes`: for some numbers of sequences, rising, ns of attention a sequence by the tokens that each has
    cached on average; between two numbers both count by their distance. `errors` are those of the fit, held out.
    """

    def __init__(
        self,
        name: str,
        tokens: Curve,
        rows: Curve,
        pairs: Curve,
        decodes: Sequence[tuple[int, Curve]],
        host: Host,
        errors: Errors | None = None,
    ) -> None:
        """`decodes`: at least one, all over the same points, of which there are two or more."""
        self.name, self.tokens, self.rows, self.pairs, self.host, self.errors = name, tokens, rows, pairs, host, errors
        self._decodes = list(decodes)
        self._of: dict[int, Curve] = {}  # ns of attention by all cached tokens, of so many sequences

    def iteration(self, batch: Batch) -> int:
        ns = self._fixed(batch.tokens, batch.sequences, batch.sampled, len(batch.prompts))
        for query, cached in batch.prompts:
            ns += self.pairs(min(query, self.pairs.at[-1])) * (query * (cached + (query + 1) / 2))
        return whole_one(ns + self._attention(batch.decodes)(batch.cached) if batch.decodes else ns)

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        read = cached + np.arange(count, dtype=np.int64) * sequences
        return whole(self._fixed(sequences, sequences, sequences, 0) + self._attention(sequences).many(read.astype(np.float64)))

    def _fixed(self, tokens: int, sequences: int, sampled: int, prompts: int) -> float:
        """What does not depend on cached tokens."""
        host = self.host
        return self.tokens(tokens) + self.rows(sampled) + (host.fixed + host.per_sequence * sequences + host.per_prompt * prompts)

    def _attention(self, sequences: int) -> Curve:
        curve = self._of.get(sequences)
        if curve is None:
            place = bisect_right([count for count, _ in self._decodes], sequences)
            (few, low), (many, high) = self._decodes[max(0, place - 1)], self._decodes[min(place, len(self._decodes) - 1)]
            share = (sequences - few) / (many - few) if few < sequences < many else 0.0
            ns = [sequences * ((1 - share) * a + share * b) for a, b in zip(low.values, high.values, strict=True)]
            curve = self._of[sequences] = Curve([sequences * x for x in low.at], ns)
        return curve
