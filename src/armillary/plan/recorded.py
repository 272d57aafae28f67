"""What was asked for once, as a demand: the requests of a recorded trace, which come faster or slower but are always the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from armillary.core.errors import InputError
from armillary.plan.demand import Demand, Moments
from armillary.serve.request import Request
from armillary.serve.workload.lengths import fitted
from armillary.serve.workload.requests import Arrival, requests
from armillary.serve.workload.trace_file import Recorded


@dataclass(frozen=True, slots=True)
class RecordedDemand(Demand):
    """All of `rows`, in the order of their arrival, `rate / self.rate` times as fast as they came.

    A trace has an end and its own ups and downs, so a rate is judged by all of it once, and not by the later half of ever longer runs. With `cut`
    those that exceed the context are shortened; without it they are refused.
    """

    rows: tuple[Arrival, ...] = ()
    rate: float = 1.0  # requests a second, as recorded
    cut: bool = False

    @classmethod
    def read(cls, path: str | Path, *, most: int | None = None, cut: bool = False, seed: int = 0) -> RecordedDemand:
        """The first `most` of a file. Raises as `Recorded`, and InputError where all come at once."""
        rows = tuple(Recorded(path, most=most))
        at = np.array([one.at for one in rows], dtype=np.float64)
        gaps = np.diff(at)
        if not len(gaps) or not gaps.any():
            raise InputError(f"{path} has no time between its requests", "give a trace of some seconds", field="trace")
        prompts, answers = (np.array([getattr(one, name) for one in rows], dtype=np.int64) for name in ("prompt", "answer"))
        lengths = fitted(Path(path).name, prompts, answers)
        return cls(lengths, float(gaps.std() / gaps.mean()), seed, rows, 1e9 / float(gaps.mean()), cut)

    @property
    def whole(self) -> int:
        return len(self.rows)

    def requests(self, rate: float, count: int, context: int) -> Iterator[Request]:
        """The first `count`, `rate` a second on average."""
        slower = self.rate / rate
        return requests(replace(one, at=round(one.at * slower)) for one in islice(self._fitting(context), count))

    def moments(self, context: int) -> Moments:
        """Of prompts, what no earlier one began with: the prefix cache may have the rest."""
        rows = list(self._fitting(context))
        prompt, answer, shared = (
            np.array([getattr(one, name) for one in rows], dtype=np.float64) for name in ("prompt", "answer", "shared")
        )
        decodes = answer - 1
        read = decodes * prompt + decodes * (decodes - 1) / 2
        return Moments(float((prompt - shared).mean()), float(answer.mean()), float(decodes.mean()), float(read.mean()))

    def longest(self, context: int) -> int:
        return max(one.prompt + one.answer for one in self._fitting(context))

    def prompt_at(self, share: float, context: int) -> int:
        """Of what no earlier one began with."""
        prompts = np.array([max(1, one.prompt - one.shared) for one in self._fitting(context)])
        return int(np.quantile(prompts, share, method="inverted_cdf"))

    def _fitting(self, context: int) -> Iterator[Arrival]:
        for place, one in enumerate(self.rows, 1):
            if one.prompt + one.answer > context and not self.cut:
                raise InputError(
                    f"request {place:,} of {self.lengths.name} has {one.prompt:,} and {one.answer:,} tokens; the context is {context:,}",
                    "give --cut to make such requests fit, or another model",
                    field="trace",
                )
            yield one.within(context)
