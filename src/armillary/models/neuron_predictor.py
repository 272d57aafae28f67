"""Which neurons of a layer will matter: Deja Vu's predictors (Liu et al., ICML 2023), a small MLP a layer, and their file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from armillary.core.errors import FormatError, InputError
from armillary.models.config import ModelConfig


class NeuronPredictor(nn.Module):
    """hidden [tokens, d] -> a logit a neuron [tokens, neurons]: positive when it is likely to be active.

    `hidden` is what attention reads (normalised) one layer ahead, so that the answer is there before the layer is; the first layer's own.
    """

    def __init__(self, hidden: int, rank: int, neurons: int) -> None:
        super().__init__()
        self.into = nn.Linear(hidden, rank)
        self.out = nn.Linear(rank, neurons)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(functional.relu(self.into(x)))
        return logits


def reads(layer: int) -> int:
    """The layer whose attention input a layer's predictor reads."""
    return max(0, layer - 1)


def save_predictors(predictors: Sequence[NeuronPredictor], path: Path) -> None:
    """One safetensors file."""
    tensors = {f"{layer}.{name}": tensor.contiguous() for layer, one in enumerate(predictors) for name, tensor in one.state_dict().items()}
    save_file(tensors, path, {"layers": json.dumps(len(predictors))})


def load_predictors(path: Path, config: ModelConfig) -> list[NeuronPredictor]:
    """Raises FormatError for a file that does not hold predictors, InputError for those of another model."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (the handle is no mapping)
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{path} cannot be read as predictors ({str(error)[:100]})", "train them again") from error
    found = []
    for layer in range(config.num_layers):
        rank = len(tensors.get(f"{layer}.into.bias", ()))
        one = NeuronPredictor(config.hidden_size, max(1, rank), config.intermediate_size)
        mine = {name: tensors.get(f"{layer}.{name}", torch.empty(0)) for name in one.state_dict()}
        wrong = [name for name, tensor in one.state_dict().items() if mine[name].shape != tensor.shape]
        if wrong:
            raise InputError(
                f"{path.name}: {layer}.{wrong[0]} has shape {list(mine[wrong[0]].shape)}, this model needs {list(one.state_dict()[wrong[0]].shape)}",
                "train predictors for this model",
                field="sparsity",
            )
        one.load_state_dict(mine)
        found.append(one.eval().requires_grad_(False))
    if len(tensors) != 4 * config.num_layers:
        raise InputError(
            f"{path.name} has predictors of more layers than this model's {config.num_layers}",
            "train predictors for this model",
            field="sparsity",
        )
    return found
