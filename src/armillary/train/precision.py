"""Mixed precision (Micikevicius et al. 2018): fp32 master weights, the passes in `compute`, and a loss scale where fp16 needs one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
from torch import Tensor, nn

PrecisionName = Literal["fp32", "bf16", "fp16"]
COMPUTE: Final = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
"""What weights and activations are in the passes; None is the weights' own dtype."""

SMALLEST_SCALE: Final = 2.0**-14  # below it even a loss of 1 is lost in fp16: the scale is not what overflows


@dataclass(slots=True)
class LossScaler:
    """S, which multiplies the loss so that small fp16 gradients do not vanish; it halves after an overflow and doubles after `interval` clean steps.

    As torch.amp.GradScaler, with the overflow flag given from outside, because it must be the same on every rank that holds a shard.
    """

    scale: float = 65536.0
    growth: float = 2.0
    backoff: float = 0.5
    interval: int = 2000
    clean_steps: int = 0

    def update(self, overflowed: bool) -> None:
        if overflowed:
            self.scale *= self.backoff
            self.clean_steps = 0
            return
        self.clean_steps += 1
        if self.clean_steps == self.interval:
            self.scale *= self.growth
            self.clean_steps = 0

    def state_dict(self) -> dict[str, Any]:
        return {"scale": self.scale, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.scale, self.clean_steps = float(state["scale"]), int(state["clean_steps"])


@torch.no_grad()
def unscale_(parameters: Iterable[nn.Parameter], scale: float) -> bool:
    """Divides every gradient by `scale`, in place, and says whether all of this rank's are finite."""
    finite = True
    for gradient in local_gradients(parameters):
        gradient.mul_(1.0 / scale)
        finite = finite and bool(torch.isfinite(gradient).all())
    return finite


def local_gradients(parameters: Iterable[nn.Parameter]) -> Iterable[Tensor]:
    """The gradients as this rank holds them: of a DTensor its own shard."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield parameter.grad.to_local() if hasattr(parameter.grad, "to_local") else parameter.grad
