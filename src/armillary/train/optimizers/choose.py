"""From a configuration to an optimizer of named parameters: who is decayed, and whom Muon takes."""

from __future__ import annotations

from typing import Any, Final

from torch import nn
from torch.optim import Optimizer

from armillary.train.config import OptimizerConfig
from armillary.train.optimizers.adafactor import Adafactor
from armillary.train.optimizers.adamw import AdamW
from armillary.train.optimizers.lion import Lion
from armillary.train.optimizers.muon import Muon
from armillary.train.parallel.apply import NamedParameters, OptimizerFactory

_CLASSES: Final[dict[str, Any]] = {"adamw": AdamW, "lion": Lion, "adafactor": Adafactor, "muon": Muon}


def factory(config: OptimizerConfig) -> OptimizerFactory:
    """Makes the optimizer that `config` describes. Vectors (norms, biases) are never decayed; frozen parameters are left out."""

    def make(named: NamedParameters) -> Optimizer:
        groups: dict[tuple[bool, str], list[nn.Parameter]] = {}
        for name, parameter in named:
            if parameter.requires_grad:
                matrix = parameter.dim() >= 2
                groups.setdefault((matrix, algorithm(config.name, name, parameter)), []).append(parameter)
        options = config.options()
        decay = options.pop("weight_decay")
        made = [
            {"params": members, "weight_decay": decay if matrix else 0.0} | ({"algorithm": kind} if config.name == "muon" else {})
            for (matrix, kind), members in groups.items()
        ]
        optimizer: Optimizer = _CLASSES[config.name](made, **options)
        return optimizer

    return make


def algorithm(optimizer: str, name: str, parameter: nn.Parameter) -> str:
    """Whose update a parameter takes: under muon, embeddings, the head and vectors take AdamW's (as Jordan et al. recommend)."""
    if optimizer != "muon":
        return optimizer
    return "muon" if parameter.dim() == 2 and not name.startswith(("embed_tokens.", "lm_head.")) else "adamw"
