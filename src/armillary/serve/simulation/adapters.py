"""What low-rank adapters add to an iteration: the weights of each that somebody in the batch has, once, and two thin products a matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from armillary.core.errors import InputError
from armillary.core.units import format_bytes
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.cost import Deployment
from armillary.serve.config import EngineConfig
from armillary.serve.schedule import Plan
from armillary.sim.costs.model import whole_one

_BYTES: Final = 2  # of a number, as S-LoRA and Punica keep them
_MOST_RANK: Final = 4096


@dataclass(frozen=True, slots=True)
class Adapters:
    """`count` adapters of `rank` on every matrix of the layers (Hu et al., ICLR 2022), all in the devices' memory, split as the matrices are."""

    count: int
    rank: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= _MOST_RANK:
            raise InputError(f"adapters of rank {self.rank}", f"give 1 to {_MOST_RANK:,}", field="adapter_rank")

    def parameters(self, model: Architecture) -> int:
        """Numbers of one adapter: rank x (inputs + outputs) a matrix. Raises InputError for layers that are not plain."""
        if model.mixture is not None or model.latent is not None:
            raise InputError(
                f"adapters of {model.name}'s experts or latents are not counted", "simulate without --adapters", field="adapters"
            )
        hidden, queries, keys = model.hidden_size, model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
        sides = 2 * (hidden + queries) + 2 * (hidden + keys) + (3 if model.gated else 2) * (hidden + model.intermediate_size)
        return model.num_layers * self.rank * sides

    def held(self, deployment: Deployment) -> int:
        """Bytes of all of them on a device."""
        layout = deployment.layout
        return -(-self.count * self.parameters(deployment.model) * _BYTES // (layout.tensor_parallel * layout.pipeline_parallel))

    def check(self, deployment: Deployment, config: EngineConfig) -> None:
        """Raises InputError where `serve` would not keep all of them in memory."""
        size = self.count * self.parameters(deployment.model) * _BYTES
        if self.count > config.max_loras:
            raise InputError(
                f"{self.count:,} adapters are to be in memory at once, and max_loras is {config.max_loras:,}",
                f"give --max-loras {self.count}; adapters that leave memory and come back are not simulated",
                field="max_loras",
            )
        if size > config.lora_memory:
            raise InputError(
                f"{self.count:,} adapters of rank {self.rank} take {format_bytes(size)}, and lora_memory is {format_bytes(config.lora_memory)}",
                f'give --lora-memory "{format_bytes(size)}", a lower rank or fewer of them',
                field="lora_memory",
            )

    def priced(self, deployment: Deployment) -> AdapterCost:
        """By the roofline of the deployment's devices."""
        device, each = deployment.device, self.parameters(deployment.model) / deployment.layout.tensor_parallel
        return AdapterCost(2 * each * 1e9 / device.attainable("fp16"), each * _BYTES * 1e9 / device.attainable_bandwidth)


@dataclass(frozen=True, slots=True)
class AdapterCost:
    """ns: `per_token` of arithmetic for each token of a request with an adapter, `per_adapter` of reading for each distinct one."""

    per_token: float
    per_adapter: float

    def of(self, plan: Plan) -> int:
        """The longer of the two; 0 where nobody has one."""
        names, tokens = set[str](), 0
        for entry, request in zip(plan.schedule.entries, plan.requests, strict=True):
            if request.adapter:
                names.add(request.adapter)
                tokens += entry.count
        return whole_one(max(self.per_token * tokens, self.per_adapter * len(names))) if names else 0
