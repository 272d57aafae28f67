"""Muon (Jordan et al. 2024): momentum, made orthogonal. For the matrices inside a model; everything else takes AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from armillary.train.optimizers import adamw

COEFFICIENTS: Final = (3.4445, -4.7750, 2.0315)
"""a, b, c of x -> a x + b x^3 + c x^5, chosen to lift small singular values fast: five rounds leave them in 0.68 .. 1.13, not at 1."""


class Muon(Optimizer):
    """Parameter groups say which algorithm is theirs: `algorithm` "muon" (matrices) or "adamw".

    Muon: m = b m + (1 - b) g; with Nesterov's u = b m + (1 - b) g, p -= lr * scale * orthogonal(u) + lr wd p, where scale is
    0.2 sqrt(max(rows, columns)): an update's RMS is then AdamW's usual 0.2, so one learning rate fits both (Liu et al. 2025, "Moonlight").
    State: `momentum` [like the parameter]. A sharded matrix is gathered for its update, because orthogonality is the whole matrix's.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        momentum: float = 0.95,
        rounds: int = 5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = True,
    ) -> None:
        options = {"lr": lr, "momentum": momentum, "rounds": rounds, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        super().__init__(groups, {**options, "fused": fused})
        for group in self.param_groups:  # a group's own, no default: ZeRO stage 1 makes its inner optimizer from the defaults
            group.setdefault("algorithm", "muon")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group["algorithm"] == "adamw":
                adamw.update_group(group, self.state)
                continue
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = _orthogonal(parameter.grad.lerp(momentum, group["momentum"]), group["rounds"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)


def newton_schulz(matrix: Tensor, rounds: int = 5) -> Tensor:
    """U V^T of the matrix's singular value decomposition, with singular values in 0.68 .. 1.13 instead of at 1. matrix: [m, n].

    Computed in bfloat16 on a GPU and in float32 elsewhere, where bfloat16 gains nothing; float64 stays float64.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if matrix.is_cuda else matrix if matrix.dtype == torch.float64 else matrix.float()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x  # the products below are [rows, rows]
    x = x / (x.norm() + 1e-7)  # singular values into 0 .. 1
    for _ in range(rounds):
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


def _orthogonal(update: Tensor, rounds: int) -> Tensor:
    if not isinstance(update, DTensor):
        return newton_schulz(update, rounds)
    whole = newton_schulz(update.full_tensor(), rounds)
    return distribute_tensor(whole, update.device_mesh, update.placements, src_data_rank=None)
