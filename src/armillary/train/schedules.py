"""The learning rate over a run: pure functions of the step, so a resumed run needs no state to continue its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from armillary.core.errors import InputError

ScheduleName = Literal["constant", "linear", "cosine", "wsd"]


@dataclass(frozen=True, slots=True)
class Schedule:
    """What the base learning rate is multiplied by. `steps`, `warmup` and `decay` in optimizer steps.

    The factor rises as (step + 1) / warmup, is 1 at step `warmup`, and would be `final` at step `steps` (one past the last).
    linear: straight down. cosine: Loshchilov & Hutter 2017. wsd: warmup, stable, then down over the last `decay` steps,
    straight or as 1 - sqrt (Hägele et al. 2024, who find it better). constant: stays at 1.
    """

    name: ScheduleName
    steps: int
    warmup: int = 0
    final: float = 0.0
    decay: int = 0
    decay_shape: Literal["linear", "sqrt"] = "sqrt"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or self.decay < 0:
            raise InputError(f"a schedule of {self.steps} steps, {self.warmup} of warm-up, {self.decay} of decay", "give none below 0")
        if self.warmup + self.decay > self.steps:
            raise InputError(
                f"{self.warmup} steps of warm-up and {self.decay} of decay do not fit into {self.steps} steps",
                "shorten them or train longer",
                field="schedule.warmup",
            )
        if self.decay and self.name != "wsd":
            raise InputError(
                f"schedule.decay is for wsd; {self.name} decays from the end of the warm-up on", "leave decay out", field="schedule.decay"
            )

    def factor(self, step: int) -> float:
        """The factor of a step; steps count from 0."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.name == "constant":
            return 1.0
        start = self.steps - self.decay if self.name == "wsd" else self.warmup
        if step < start or start >= self.steps:
            return 1.0
        gone = min(1.0, (step - start) / (self.steps - start))
        if self.name == "cosine":
            left = 0.5 * (1 + math.cos(math.pi * gone))
        elif self.name == "wsd" and self.decay_shape == "sqrt":
            left = 1 - math.sqrt(gone)
        else:
            left = 1 - gone
        return self.final + (1 - self.final) * left
