"""Clipping by the norm of the whole gradient (Pascanu et al. 2013), right whatever the layout: the norm comes from outside."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def clip_(parameters: Iterable[nn.Parameter], norm: Tensor, limit: float) -> None:
    """Scales all gradients by limit / norm where norm > limit. `norm` is the global one: L2 over every shard of every parameter, once."""
    # As torch.nn.utils.clip_grads_with_norm_: the 1e-6 keeps a norm of 0 from dividing, and the factor never exceeds 1.
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    if factor < 1:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))
