"""The one interface between the trainer and a layout: what the trainer asks of a model that may live on many ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from armillary.kernels.attention import Attend
from armillary.models.decoder import Decoder
from armillary.train.loss import linear_cross_entropy

NamedParameters = Iterable[tuple[str, nn.Parameter]]
OptimizerFactory = Callable[[NamedParameters], Optimizer]
"""Makes an optimizer of named parameters: the names (those of `models/`) decide which algorithm and which weight decay each gets."""


class Parallel(Protocol):
    """A model on its ranks. Every method that communicates must be called by all ranks, in the same order.

    `model`'s parameters are the master weights; names are those of `models/`, never wrapped ones.
    """

    @property
    def model(self) -> nn.Module: ...

    rank: int
    world: int
    dp_rank: int
    dp_world: int

    def loss_sum(self, tokens: Tensor, positions: Tensor, targets: Tensor, attend: Attend) -> Tensor:
        """Sum of cross-entropy over the scored targets of this rank's micro-batch; differentiable, float32. tokens, positions, targets: [T]."""
        ...

    def sync_gradients(self, last: bool) -> AbstractContextManager[Any]:
        """Around a backward pass. `last` False: gradients are only added up here. True: they are summed over data-parallel ranks as well."""
        ...

    def sum_over_dp(self, values: Tensor) -> Tensor:
        """Counts and losses, summed over data-parallel ranks; the same on all ranks."""
        ...

    def any_rank(self, flag: bool) -> bool:
        """Whether any rank, of all, says so; the same on all ranks."""
        ...

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """L2 norm of the whole gradient, every shard counted once; float32, the same on all ranks."""
        ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Parameters (or shards) under the names of `models/`."""
        ...

    def make_optimizer(self, factory: OptimizerFactory) -> Optimizer:
        """The optimizer over this rank's parameters; ZeRO shards its state here."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Parameters under global names, as torch.distributed.checkpoint takes them."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...

    def whole_model(self) -> Decoder | None:
        """The model with whole parameters, to be saved: on rank 0; None on the others."""
        ...


class TokenLoss(nn.Module):
    """A decoder and its loss as one module, whose `forward` is `Parallel.loss_sum`: what wrappers that hook `forward` need."""

    def __init__(self, model: Decoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, positions: Tensor, targets: Tensor, attend: Attend) -> Tensor:
        hidden = self.model.hidden(tokens, positions, attend)
        return linear_cross_entropy(hidden, self.model.lm_head.weight, targets, self.model.config.logit_softcap)


class Single:
    """One process, the model unchanged. `compute_dtype` other than the weights' own: weights are cast at the start of each pass.

    The cast is the only place where precision changes (no autocast): gradients come back through it in the weights' dtype.
    """

    rank = dp_rank = 0
    world = dp_world = 1

    def __init__(self, model: Decoder, compute_dtype: torch.dtype | None = None) -> None:
        self.model = model
        self.compute_dtype = compute_dtype
        self._loss = TokenLoss(model)

    def loss_sum(self, tokens: Tensor, positions: Tensor, targets: Tensor, attend: Attend) -> Tensor:
        arguments = (tokens, positions, targets, attend)
        if self.compute_dtype is None:
            loss: Tensor = self._loss(*arguments)
            return loss
        weights = {f"model.{name}": weight.to(self.compute_dtype) for name, weight in self.named_parameters()}
        loss = torch.func.functional_call(self._loss, weights, arguments)
        return loss

    def sync_gradients(self, last: bool) -> AbstractContextManager[Any]:
        return nullcontext()

    def sum_over_dp(self, values: Tensor) -> Tensor:
        return values

    def any_rank(self, flag: bool) -> bool:
        return flag

    def gradient_norm(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        return torch.nn.utils.get_total_norm(gradients, foreach=True).float()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def make_optimizer(self, factory: OptimizerFactory) -> Optimizer:
        return factory(self.named_parameters())

    def state_dict(self) -> dict[str, Any]:
        return self.model.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.model.load_state_dict(state)

    def whole_model(self) -> Decoder:
        return self.model
