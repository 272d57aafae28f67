"""Perplexity on held-out text, the same rows every time, whatever the number of ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from armillary.core.errors import InputError
from armillary.data.batches import IGNORE, BatchStream, Source
from armillary.train.batches import micro_batch
from armillary.train.parallel.apply import Parallel


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Mean negative log-likelihood of `tokens` scored tokens, in nats."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that overflows."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def evaluate(parallel: Parallel, source: Source, *, rows: int, length: int, batches: int) -> Evaluation:
    """Scores `batches` batches of `rows` rows in all (each rank its share), drawn from one shuffled pass over `source` with seed 0.

    Sums, not means, are added up, so the result depends on the rows alone. All ranks call it. Raises InputError when nothing is scored.
    """
    share = -(-rows // parallel.dp_world)
    first = min(rows, parallel.dp_rank * share)
    totals = torch.zeros(2, dtype=torch.float64)
    for _, batch in zip(range(batches), BatchStream(source, rows=rows, length=length, seed=0, epochs=1), strict=False):
        if first == rows:  # more ranks than rows: this one scores nothing, and computes because the others wait for its part
            batch.targets.fill_(IGNORE)
        part = micro_batch(batch, min(first, rows - 1), min(rows, first + share))
        totals[0] += float(parallel.loss_sum(part.tokens, part.positions, part.targets, part.attend))
        totals[1] += part.scored
    loss, tokens = parallel.sum_over_dp(totals).tolist()
    if not tokens:
        raise InputError("the evaluation's rows score no token", "check the split, or evaluate more batches")
    return Evaluation(loss / tokens, int(tokens))
