"""How a model is spread over devices, and which layouts a model allows."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.core.errors import InputError
from armillary.models.graph.architecture import Architecture


@dataclass(frozen=True, slots=True)
class Layout:
    """Degrees of parallelism, each at least 1. A pipeline stage is `tensor_parallel * data_parallel` devices.

    `tensor_parallel` splits heads, MLP columns and vocabulary (Shoeybi et al. 2019); `sequence_parallel` also splits what lies between
    them by tokens, so an all-reduce becomes a reduce-scatter and an all-gather (Korthikanti et al. 2023). `data_parallel` replicas of a
    stage each run a batch of their own. `expert_parallel` spreads whole experts over so many devices of a stage, across replicas too,
    with an all-to-all before and after (Lepikhin et al. 2021); at 1 every expert is split like an MLP. `batch_attention` splits the cache over
    the tensor ranks by sequences instead of heads, with all-to-alls of queries and outputs (Pope et al. 2023): what multiquery attention,
    whose one head every rank would hold, needs. It counts the mean rank, so a batch should have at least `tensor_parallel` sequences.
    """

    tensor_parallel: int = 1
    pipeline_parallel: int = 1
    expert_parallel: int = 1
    data_parallel: int = 1
    sequence_parallel: bool = False
    batch_attention: bool = False

    def __post_init__(self) -> None:
        for name in ("tensor_parallel", "pipeline_parallel", "expert_parallel", "data_parallel"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}", "every degree is at least 1", field=name)
        if self.sequence_parallel and self.tensor_parallel == 1:
            raise InputError(
                "sequence_parallel with tensor_parallel 1 splits nothing",
                "set tensor_parallel to 2 or more, or leave sequence_parallel off",
                field="sequence_parallel",
            )
        if self.batch_attention and self.tensor_parallel == 1:
            raise InputError(
                "batch_attention with tensor_parallel 1 splits nothing",
                "set tensor_parallel to 2 or more, or leave batch_attention off",
                field="batch_attention",
            )
        if self.tensor_parallel * self.data_parallel % self.expert_parallel:
            raise InputError(
                f"expert_parallel {self.expert_parallel} does not divide the {self.tensor_parallel * self.data_parallel} devices of a stage "
                f"(tensor_parallel {self.tensor_parallel} x data_parallel {self.data_parallel})",
                "choose a divisor",
                field="expert_parallel",
            )

    @property
    def devices(self) -> int:
        """All devices, replicas included."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel

    def layers(self, num_layers: int, stage: int) -> range:
        """Layers of a pipeline stage: as even as can be, the longer stages in the middle, for the first and last have more to do."""
        stages = self.pipeline_parallel
        each, more = divmod(num_layers, stages)
        first_longer = (stages - more) // 2
        start = stage * each + min(max(stage - first_longer, 0), more)
        return range(start, start + each + (first_longer <= stage < first_longer + more))


def check(model: Architecture, layout: Layout) -> None:
    """Raises InputError when the model cannot be laid out so, with the bound and the degrees that fit."""
    tensor = layout.tensor_parallel
    if model.num_heads % tensor:
        raise InputError(
            f"{model.name} has {model.num_heads} attention heads, which tensor_parallel {tensor} does not divide",
            f"choose tensor_parallel from {_divisors(model.num_heads)}",
            field="tensor_parallel",
        )
    if layout.batch_attention and model.latent is not None:
        raise InputError(
            f"{model.name}: a latent's attention over the batch is not counted here",
            "give every device an attention of its own with data_parallel instead",
            field="batch_attention",
        )
    if model.latent is None and model.num_kv_heads % tensor and tensor % model.num_kv_heads:
        raise InputError(
            f"{model.name} has {model.num_kv_heads} key/value heads, which tensor_parallel {tensor} neither divides nor is a multiple of",
            f"choose a divisor or a multiple of {model.num_kv_heads}",
            field="tensor_parallel",
        )
    widths = {"intermediate_size": model.intermediate_size}
    if model.mixture is not None:
        widths = {"intermediate_size": model.intermediate_size} if model.mixture.dense_layers else {}
        if layout.expert_parallel == 1:
            widths["the experts' intermediate_size"] = model.mixture.intermediate_size
    for name, width in widths.items():
        if width % tensor:
            raise InputError(
                f"{model.name}: {name} is {width}, which tensor_parallel {tensor} does not divide",
                f"choose tensor_parallel from {_divisors(width)}",
                field="tensor_parallel",
            )
    if layout.pipeline_parallel > model.num_layers:
        raise InputError(
            f"{model.name} has {model.num_layers} layers for {layout.pipeline_parallel} pipeline stages",
            f"set pipeline_parallel to {model.num_layers} or less",
            field="pipeline_parallel",
        )
    if layout.expert_parallel > 1:
        if model.mixture is None:
            raise InputError(f"{model.name} has no experts", "leave expert_parallel at 1", field="expert_parallel")
        if model.mixture.experts % layout.expert_parallel:
            raise InputError(
                f"{model.name} has {model.mixture.experts} experts, which expert_parallel {layout.expert_parallel} does not divide",
                f"choose expert_parallel from {_divisors(model.mixture.experts)}",
                field="expert_parallel",
            )


def _divisors(number: int) -> str:
    return ", ".join(str(degree) for degree in range(1, min(number, 1024) + 1) if number % degree == 0)
