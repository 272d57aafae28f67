"""A line through what was measured: DistServe's model of an iteration (Zhong et al., OSDI 2024, section 4.1 and appendix A)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from armillary.sim.batch import Batch
from armillary.sim.costs.model import whole, whole_one


@dataclass(frozen=True, slots=True)
class Decoding:
    """ns of an iteration of decodes: `fixed` + `per_cached` x tokens read + `per_sequence` x sequences."""

    fixed: float
    per_cached: float
    per_sequence: float


@dataclass(frozen=True, slots=True)
class Linear:
    """ns: a prompt takes `fixed` + `per_token` x its tokens + `per_pair` x (query x keys it reads), and decodes are a line of their own.

    For whole prompts the pairs are their squared lengths, as in the paper; a later piece of a prompt of q tokens after c computed
    ones has q (q + 2 c): pieces add up to the whole. `large` is the line from `switch` decodes on, where the batch has become compute-bound.
    An iteration of both takes the time of the prompts and what the decodes add to it: their parts without the fixed one.
    `stages`: pipeline stages, by which a prompt's time is divided.
    """

    name: str
    fixed: float
    per_token: float
    per_pair: float
    small: Decoding
    large: Decoding | None = None
    switch: int = 95
    stages: int = 1

    def iteration(self, batch: Batch) -> int:
        line = self._line(batch.decodes)
        ns = line.per_cached * batch.cached + line.per_sequence * batch.decodes
        if not batch.prompts:
            return whole_one(line.fixed + ns)
        pairs = sum(query * (query + 2 * cached) for query, cached in batch.prompts)
        prompt = (self.fixed + self.per_token * batch.prompt_tokens + self.per_pair * pairs) / self.stages
        return whole_one(prompt + ns)

    def decodes(self, sequences: int, cached: int, count: int) -> NDArray[np.int64]:
        line = self._line(sequences)
        read = cached + np.arange(count, dtype=np.int64) * sequences
        return whole(line.fixed + (line.per_cached * read.astype(np.float64) + line.per_sequence * sequences))

    def _line(self, decodes: int) -> Decoding:
        return self.large if self.large is not None and decodes >= self.switch else self.small
