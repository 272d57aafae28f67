"""From measured iterations to `Fitted`: non-negative least squares over lines between knots, and what it gets wrong of what it has not seen."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.sim.batch import Batch
from armillary.sim.costs.fitted import Curve, Errors, Fitted, Host

Floats = NDArray[np.float64]

# Kernels work in tiles: lines between these are within a tile's step of it.
TOKENS: Final = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)
ROWS: Final = (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
QUERIES: Final = (1, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCES: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS: Final = (0, 128, 512, 1024, 2048, 4096, 8192, 16384)
SMOOTH: Final = 0.02  # what a bend costs beside relative errors: it matters where nothing was measured
ROUNDS: Final = 4  # of weighing down what lies far off: a timer that was interrupted
FAR: Final = 1.0  # an iteration that took more than twice as long counts by its distance: below that, durations add up to what was measured
ALONE: Final = 0.3  # what a plan that ran alone counts beside an iteration in service, whose caches know the one before it
FOLDS: Final = 5


@dataclass(frozen=True, slots=True)
class Sample:
    """A measured iteration: ns of the executor, and of the host from one to the next (None where the executor ran alone)."""

    batch: Batch
    ns: int
    host: int | None = None


def fit(name: str, samples: Sequence[Sample], folds: int = FOLDS) -> Fitted:
    """The curves through `samples`, and the errors of those that leave out each `folds`-th of them in turn: of iterations in service, where there
    are any. Deterministic.

    Raises InputError where there are too few for any curve, or some that take no time.
    """
    if len(samples) < 2 * folds or not any(sample.batch.decodes for sample in samples):
        raise InputError(f"{len(samples)} measured iterations give no curves", f"give at least {2 * folds}, decodes among them")
    if bad := next((sample for sample in samples if sample.ns <= 0 or (sample.host or 0) < 0), None):
        raise InputError(f"an iteration of {bad.ns} ns was not measured", "calibrate again", field="ns")
    knots = _Knots.of(samples)
    served = any(sample.host is not None for sample in samples)
    wrong: list[float] = []
    for fold in range(folds):
        seen = [sample for place, sample in enumerate(samples) if place % folds != fold]
        model = knots.model(name, _curves(knots, seen), _host(seen))
        for sample in samples[fold::folds]:
            if served and sample.host is None:
                continue
            beside = model.host.of(sample.batch) if sample.host is None else 0.0
            wrong.append(abs((model.iteration(sample.batch) - beside) / (sample.ns + (sample.host or 0)) - 1))
    p50, p90 = np.quantile(wrong, (0.5, 0.9)).tolist()
    return knots.model(name, _curves(knots, samples), _host(samples), Errors(len(wrong), p50, p90, max(wrong)))


@dataclass(frozen=True, slots=True)
class _Knots:
    """Where lines meet: as far as something was measured. Columns: 1, slopes by tokens, slopes by rows, ns a pair, slopes of attention by
    (sequences, context)."""

    tokens: tuple[int, ...]
    rows: tuple[int, ...]
    queries: tuple[int, ...]
    sequences: tuple[int, ...]
    contexts: tuple[int, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> _Knots:
        batches = [sample.batch for sample in samples]
        decodes = [batch for batch in batches if batch.decodes]
        return cls(
            _up_to(TOKENS, max(batch.tokens for batch in batches)),
            _up_to(ROWS, max(batch.sampled for batch in batches)),
            _up_to(QUERIES, max((query for batch in batches for query, _ in batch.prompts), default=1)),
            _up_to(SEQUENCES, max(batch.decodes for batch in decodes)),
            _up_to(CONTEXTS, max(batch.cached // batch.decodes for batch in decodes)),
        )

    def columns(self, batch: Batch) -> Floats:
        """What of a batch each coefficient is multiplied by."""
        pairs = np.zeros(len(self.queries))
        for query, cached in batch.prompts:
            pairs += _hats(self.queries, query) * (query * (cached + (query + 1) / 2))
        reads = np.zeros((len(self.sequences), len(self.contexts) - 1))
        if batch.decodes:
            each = _ramps(self.contexts, batch.cached / batch.decodes)
            reads = np.outer(_hats(self.sequences, batch.decodes) * batch.decodes, each)
        return np.concatenate([[1.0], _ramps(self.tokens, batch.tokens), _ramps(self.rows, batch.sampled), pairs, reads.reshape(-1)])

    def bends(self) -> Floats:
        """Rows that are small where neighbouring coefficients are alike, each in ns of what the narrower one does."""
        starts = np.cumsum([0, 1, len(self.tokens) - 1, len(self.rows) - 1, len(self.queries)]).tolist()
        width = starts[4] + len(self.sequences) * (len(self.contexts) - 1)
        rows: list[Floats] = []

        def alike(one: int, other: int, size: float) -> None:
            row = np.zeros(width)
            row[one], row[other] = size, -size
            rows.append(row)

        for start, knots in ((starts[1], self.tokens), (starts[2], self.rows)):
            steps = np.diff(knots)
            for place in range(len(steps) - 1):
                alike(start + place, start + place + 1, float(min(steps[place], steps[place + 1])))
        for place in range(len(self.queries) - 1):
            alike(starts[3] + place, starts[3] + place + 1, self.queries[place] ** 2)
        steps = np.diff(self.contexts)
        for many, count in enumerate(self.sequences):
            for place, step in enumerate(steps):
                here = starts[4] + many * len(steps) + place
                if place + 1 < len(steps):
                    alike(here, here + 1, float(count * step))
                if many + 1 < len(self.sequences):
                    alike(here, here + len(steps), float(count * step))
        return np.array(rows).reshape(-1, width)

    def model(self, name: str, found: Floats, host: Host, errors: Errors | None = None) -> Fitted:
        """The curves that the coefficients stand for."""
        slopes, rows, pairs, reads = np.split(found[1:], np.cumsum([len(self.tokens) - 1, len(self.rows) - 1, len(self.queries)]))
        steps = np.diff(self.contexts)
        of_each = reads.reshape(len(self.sequences), len(steps))
        return Fitted(
            name,
            Curve(self.tokens, found[0] + np.concatenate([[0.0], np.cumsum(slopes * np.diff(self.tokens))])),
            Curve(self.rows, np.concatenate([[0.0], np.cumsum(rows * np.diff(self.rows))])),
            Curve(self.queries, pairs),
            [
                (count, Curve(self.contexts, np.concatenate([[0.0], np.cumsum(own * steps)])))
                for count, own in zip(self.sequences, of_each, strict=True)
            ],
            host,
            errors,
        )


def _curves(knots: _Knots, samples: Sequence[Sample]) -> Floats:
    """The executor's coefficients."""
    ns = np.array([sample.ns for sample in samples], dtype=np.float64)
    counts = np.array([ALONE if sample.host is None else 1.0 for sample in samples])
    return _solve(np.array([knots.columns(sample.batch) for sample in samples]), ns, knots.bends() * (SMOOTH / np.median(ns)), counts)


def _host(samples: Sequence[Sample]) -> Host:
    """Of the samples that have it."""
    found = [(sample.batch, sample.host) for sample in samples if sample.host]
    if not found:
        return Host()
    rows = np.array([(1.0, batch.sequences, len(batch.prompts)) for batch, _ in found])
    return Host(*_solve(rows, np.array([ns for _, ns in found], dtype=np.float64), np.zeros((0, 3)), np.ones(len(found))).tolist())


def _solve(rows: Floats, ns: Floats, bends: Floats, counts: Floats) -> Floats:
    """Coefficients, none negative, by which `rows` come to `ns`: the least squares of errors relative to what is predicted, each times its `counts`.

    Relative to what was measured the short ones would count more, and all would be predicted too short. What lies far off counts by its
    distance, not by its square (Huber). Interruptions only ever make an iteration longer: a narrow bound would predict the usual iteration,
    and requests feel the sum of many.
    """
    from scipy.optimize import nnls

    scale = np.maximum(np.abs(rows / ns[:, None]).max(axis=0), 1e-12 * np.abs(rows / ns[:, None]).max())
    weights, found = counts / ns, np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        matrix = np.concatenate([rows * weights[:, None], bends]) / scale
        found, _ = nnls(matrix, np.concatenate([ns * weights, np.zeros(len(bends))]), maxiter=50 * rows.shape[1])
        said = np.maximum(rows @ (found / scale), ns / 10)
        weights = counts * np.sqrt(np.minimum(1.0, FAR / np.maximum(np.abs(ns / said - 1), 1e-12))) / said
    solved: Floats = found / scale
    return solved


def _up_to(knots: Sequence[int], most: int) -> tuple[int, ...]:
    """At least two, and the last one is the first that is not below `most`."""
    return tuple(knots[: max(2, bisect_right(knots, most - 1) + 1)])


def _ramps(knots: Sequence[int], x: float) -> Floats:
    """How much of each interval lies below x; the last one has no end. [knots - 1]"""
    at = np.array(knots, dtype=np.float64)
    below = np.minimum(np.maximum(x - at[:-1], 0.0), np.diff(at))
    if x > at[-1]:
        below[-1] = x - at[-2]
    return below


def _hats(knots: Sequence[int], x: float) -> Floats:
    """By how much each knot counts at x: the two beside it by their distance. [knots]"""
    found = np.zeros(len(knots))
    place = min(max(bisect_right(knots, x) - 1, 0), len(knots) - 2)
    share = min(max((x - knots[place]) / (knots[place + 1] - knots[place]), 0.0), 1.0)
    found[place], found[place + 1] = 1 - share, share
    return found
