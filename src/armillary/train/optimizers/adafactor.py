"""Adafactor (Shazeer & Stern 2018): Adam's second moment of a matrix kept as one row and one column."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


class Adafactor(Optimizer):
    """State of a [m, n] matrix: `row` [m] and `column` [n]; of a vector: `square` [n]; `exp_avg` too when `beta1` is given.

    v_t decays with 1 - t^decay_rate; an update's RMS is bounded by `clip_threshold`; with `scale_parameter` the learning rate is
    relative to the parameter's RMS (at least `eps[1]`). `eps[0]` is added to every squared gradient. As in `transformers`, whose
    `relative_step` is the business of a schedule here.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-2,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
    ) -> None:
        options = {"lr": lr, "eps": eps, "clip_threshold": clip_threshold, "decay_rate": decay_rate, "beta1": beta1}
        super().__init__(parameters, {**options, "weight_decay": weight_decay, "scale_parameter": scale_parameter})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            if gradient.dim() >= 2:
                state["row"] = torch.zeros_like(gradient[..., 0])
                state["column"] = torch.zeros_like(gradient[..., 0, :])
            else:
                state["square"] = torch.zeros_like(gradient)
            if group["beta1"] is not None:
                state["exp_avg"] = torch.zeros_like(gradient)
        state["step"] += 1
        lr = group["lr"] * (max(group["eps"][1], float(_rms(parameter))) if group["scale_parameter"] else 1.0)
        keep = 1.0 - state["step"] ** group["decay_rate"]
        square = gradient**2 + group["eps"][0]
        if "row" in state:
            row = state["row"].mul_(keep).add_(square.mean(dim=-1), alpha=1 - keep)
            column = state["column"].mul_(keep).add_(square.mean(dim=-2), alpha=1 - keep)
            # The rank-1 matrix with these row and column means that is nearest in the I-divergence.
            update = (row / row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1) * column.unsqueeze(-2).rsqrt()
            update.mul_(gradient)
        else:
            update = state["square"].mul_(keep).add_(square, alpha=1 - keep).rsqrt().mul_(gradient)
        update.div_((_rms(update) / group["clip_threshold"]).clamp_(min=1.0)).mul_(lr)
        if group["beta1"] is not None:
            update = state["exp_avg"].mul_(group["beta1"]).add_(update, alpha=1 - group["beta1"])
        if group["weight_decay"]:
            parameter.add_(parameter, alpha=-group["weight_decay"] * lr)
        parameter.sub_(update)


def _rms(tensor: Tensor) -> Tensor:
    root: Tensor = tensor.norm(2) / tensor.numel() ** 0.5
    return root
