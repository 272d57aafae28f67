"""Whether a replica gets requests: one that is silent or much slower than the others does not, for a while."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["open", "slow", "silent"]


@dataclass(frozen=True, slots=True)
class Pulse:
    """What is known of a replica's health. `silent` ns since anything was heard; `slowness`: its times to first token over its classes' medians."""

    silent: int
    slowness: float
    samples: int  # that `slowness` is made of, since it last was let in


@dataclass(frozen=True, slots=True)
class Probation:
    """`silence` ns without a sign of life, or `factor` times slower than the median over at least `samples` requests.

    A silent replica's requests are given to others; a slow one keeps those that it has. After `sentence` ns, doubled each time
    up to `longest`, a slow replica is tried again with real requests; a silent one as soon as it is heard.
    """

    silence: int = 3_000_000_000
    factor: float = 3.0
    samples: int = 8
    sentence: int = 5_000_000_000
    longest: int = 300_000_000_000

    def step(self, pulse: Pulse) -> Verdict:
        if pulse.silent > self.silence:
            return "silent"
        return "slow" if pulse.samples >= self.samples and pulse.slowness > self.factor else "open"

    def term(self, before: int) -> int:
        """ns of probation for a replica that was found slow `before` times."""
        return min(self.longest, self.sentence << min(before, 30))
