"""What will be asked for: lengths and how arrivals vary, with the same requests and the same unit gaps at every rate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np

from armillary.serve.request import Request
from armillary.serve.workload.arrivals import bursty
from armillary.serve.workload.lengths import Lengths
from armillary.serve.workload.requests import arrivals, requests

_SAMPLE: Final = 4096  # requests that stand for all in closed forms


@dataclass(frozen=True, slots=True)
class Demand:
    """Requests of `lengths` whose gaps have the coefficient of variation `variation` (1 is Poisson).

    Common random numbers: at every rate request i has the same lengths, and the gap before it is the same in units of the mean gap. So two rates,
    or two configurations, differ by what they are and not by what they happened to be asked. `armillary simulate serve` with the same seed has
    the same requests.
    """

    lengths: Lengths
    variation: float = 1.0
    seed: int = 0

    @property
    def whole(self) -> int | None:
        """How many requests there are; None where it is as many as it takes to judge."""
        return None

    def requests(self, rate: float, count: int, context: int) -> Iterator[Request]:
        """The first `count`, `rate` a second on average, cut to `context` tokens."""
        times = bursty(rate, self.variation, self.seed)
        return requests(arrivals(times, self.lengths, count, self.seed + 1, limit=context))

    def moments(self, context: int) -> Moments:
        """Means of what the requests ask for."""
        pairs = np.array(list(islice(self.lengths.draw(self.seed + 1, context), _SAMPLE)), dtype=np.float64)
        prompt, answer = pairs[:, 0], pairs[:, 1]
        decodes = answer - 1  # the prompt's iteration gives the first token
        read = decodes * prompt + decodes * (decodes - 1) / 2
        return Moments(float(prompt.mean()), float(answer.mean()), float(decodes.mean()), float(read.mean()))

    def longest(self, context: int) -> int:
        """Tokens of prompt and answer that no request exceeds."""
        return min(context, math.ceil(self.lengths.prompt[-1]) + math.ceil(self.lengths.answer[-1]))

    def prompt_at(self, share: float, context: int) -> int:
        """The prompt length that `share` of the requests do not exceed."""
        prompts = np.array([prompt for prompt, _ in islice(self.lengths.draw(self.seed + 1, context), _SAMPLE)])
        return int(np.quantile(prompts, share, method="inverted_cdf"))


@dataclass(frozen=True, slots=True)
class Moments:
    """Means a request, in tokens: `decodes` are the iterations after its prompt's, in which it reads `read` cached tokens in all."""

    prompt: float
    answer: float
    decodes: float
    read: float
