"""What a step's result says to a reader: loss, speed, how well the machine is used, memory, time left. Pure: values in, values out."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from armillary.core.units import S
from armillary.models.config import ModelConfig
from armillary.train.flops import hardware_flops, model_flops
from armillary.train.memory.checkpointing import Level
from armillary.train.trainer import StepResult

WINDOW = 20  # steps that speeds are averaged over


@dataclass(frozen=True, slots=True)
class Reading:
    """One line of progress. Speeds are means over the last WINDOW steps; `mfu`, `hfu` None when the peak is not known."""

    step: int
    steps: int
    loss: float  # nats a token
    gradient_norm: float
    learning_rate: float
    tokens: int  # of all steps so far
    tokens_per_second: float
    mfu: float | None  # 0 .. 1
    hfu: float | None
    memory: int  # bytes that this process holds
    seconds: float  # of this step
    seconds_left: float
    waited: float  # share of the time that was spent waiting for data
    loss_scale: float
    skipped: bool

    def json(self) -> dict[str, Any]:
        """Plain values, as `--json` and metrics.jsonl have them; None for what is not finite, which JSON cannot say."""
        return {"event": "step", **{name: finite(value) for name, value in asdict(self).items()}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Reading:
        """Of the fields of `json`. A loss or a norm that was not finite reads as nan."""
        values = {name: value[name] for name in cls.__dataclass_fields__}
        return cls(**values | {name: math.nan for name in ("loss", "gradient_norm") if values[name] is None})


def finite(value: Any) -> Any:
    """None for a float that is not finite; anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Meter:
    """Turns steps into readings. `peak`: FLOP/s of all ranks together, None when it was not measured; `plan`: what blocks compute again."""

    def __init__(self, config: ModelConfig, steps: int, peak: float | None = None, plan: Sequence[Level] = (), tokens: int = 0) -> None:
        self.config, self.steps, self.peak, self.plan = config, steps, peak, plan
        self.tokens = tokens
        self._recent: deque[StepResult] = deque(maxlen=WINDOW)

    def read(self, result: StepResult, memory: int) -> Reading:
        """`memory` in bytes, at the end of the step."""
        self._recent.append(result)
        self.tokens += result.tokens
        time = max(1, sum(r.duration for r in self._recent)) / S
        tokens, attended = sum(r.tokens for r in self._recent), sum(r.attended for r in self._recent)
        rate = None if self.peak is None else self.peak * time
        return Reading(
            step=result.step,
            steps=self.steps,
            loss=result.loss,
            gradient_norm=result.gradient_norm,
            learning_rate=result.learning_rate,
            tokens=self.tokens,
            tokens_per_second=tokens / time,
            mfu=None if rate is None else model_flops(self.config, tokens, attended) / rate,
            hfu=None if rate is None else hardware_flops(self.config, tokens, attended, self.plan) / rate,
            memory=memory,
            seconds=result.duration / S,
            seconds_left=(self.steps - result.step) * time / len(self._recent),
            waited=sum(r.waited for r in self._recent) / S / time,
            loss_scale=result.loss_scale,
            skipped=result.skipped,
        )
