"""AdamW (Kingma & Ba 2015; decoupled decay: Loshchilov & Hutter 2019)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class AdamW(Optimizer):
    """m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; p -= lr (m / c1) / (sqrt(v / c2) + eps) + lr wd p.

    `fused` updates each tensor in one pass over memory (torch's kernel); otherwise in torch's plain order of operations, bit for
    bit `torch.optim.AdamW(foreach=False)`. State: `exp_avg`, `exp_avg_sq` [like the parameter], `step` (float32 scalar).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        fused: bool = True,
    ) -> None:
        super().__init__(parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fused": fused})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            update_group(group, self.state)


def update_group(group: dict[str, Any], states: MutableMapping[Any, dict[str, Any]]) -> None:
    """One step of all parameters of a group that have a gradient; makes their state at the first."""
    parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
    for parameter in parameters:
        if not states[parameter]:
            states[parameter]["step"] = torch.zeros((), dtype=torch.float32)
            states[parameter]["exp_avg"] = torch.zeros_like(parameter)
            states[parameter]["exp_avg_sq"] = torch.zeros_like(parameter)
    kept = [states[parameter] for parameter in parameters]
    if not group["fused"]:
        for parameter, state in zip(parameters, kept, strict=True):
            state["step"] += 1
            _update(parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"], int(state["step"]), group)
    elif parameters:
        torch._foreach_add_([state["step"] for state in kept], 1)
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in kept],
            [state["exp_avg_sq"] for state in kept],
            [],
            [state["step"] for state in kept],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )


def _update(parameter: Tensor, gradient: Tensor, m: Tensor, v: Tensor, step: int, group: dict[str, Any]) -> None:
    """One parameter's update, in place. `step` counts from 1."""
    beta1, beta2 = group["betas"]
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    m.lerp_(gradient, 1 - beta1)
    v.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    parameter.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
