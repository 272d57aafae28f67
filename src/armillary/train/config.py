"""What a training run may be told: one TOML file, every key with its default, its bounds and what it means."""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, model_validator

from armillary.core.config import Config
from armillary.core.errors import InputError
from armillary.kernels.activations import Activation
from armillary.train.precision import PrecisionName
from armillary.train.schedules import ScheduleName

_OPTIONS: Final[dict[str, dict[str, Any]]] = {
    "adamw": {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1},
    "lion": {"betas": (0.9, 0.99), "weight_decay": 0.1},
    "adafactor": {"beta1": None, "weight_decay": 0.0, "scale_parameter": True, "clip_threshold": 1.0},
    "muon": {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "momentum": 0.95},
}
"""The options of each optimizer, with its defaults."""

_LEARNING_RATES: Final = {"adamw": 1e-3, "lion": 1e-4, "adafactor": 1e-2, "muon": 1e-3}


class ArchitectureConfig(Config):
    """A model from scratch, of the Llama family. Sizes left at none follow from the others."""

    layers: int = Field(6, ge=1, le=1024)
    """Transformer blocks."""
    hidden: int = Field(256, ge=8, le=1 << 17)
    """Width of the residual stream."""
    heads: int = Field(4, ge=1, le=1024)
    """Query heads."""
    kv_heads: int | None = Field(None, ge=1, le=1024)
    """Key/value heads (none: as many as heads)."""
    head_dim: int | None = Field(None, ge=2, le=1024)
    """Width of a head (none: hidden / heads)."""
    intermediate: int | None = Field(None, ge=8, le=1 << 19)
    """Width of the MLP (none: 8/3 of hidden, rounded up to a multiple of 64)."""
    context: int | None = Field(None, ge=2, le=1 << 24)
    """Longest sequence, in tokens (none: batch.length)."""
    tie_embeddings: bool = True
    """Whether the head shares the embedding's weight."""
    activation: Activation = Field("silu", description="of the MLP's gate; relu leaves most neurons at zero")
    qk_norm: bool = False
    """Whether queries and keys are normalised, as in Qwen3."""
    rope_theta: float = Field(10_000.0, gt=1, le=1e9)
    """Base of the rotary embedding's frequencies."""


class BatchConfig(Config):
    """How much an optimizer step reads. `rows` is of all ranks together, `micro_rows` of one rank in one pass."""

    rows: int = Field(32, ge=1, le=1 << 20)
    """Rows of a global batch: all micro-batches of all ranks."""
    micro_rows: int = Field(8, ge=1, le=1 << 20)
    """Rows of one forward and backward pass on one rank: memory, never the result."""
    length: int = Field(256, ge=2, le=1 << 24)
    """Tokens of a row."""


class PartConfig(Config):
    """One source of a mixture; exactly one of weight, fraction and count."""

    folder: str
    """Prepared data (armillary data prepare)."""
    weight: float | None = Field(None, gt=0)
    """Share of the epoch's tokens, relative to the other weights."""
    fraction: float | None = Field(None, gt=0)
    """Passes over its own documents an epoch."""
    count: int | None = Field(None, ge=1)
    """Documents an epoch."""


class DataConfig(Config):
    """What is read: one prepared folder, or a mixture of several."""

    folder: str | None = None
    """A folder that `armillary data prepare` made."""
    mixture: dict[str, PartConfig] = Field(default_factory=dict)
    """Several folders by name, each with a share: [data.mixture] sotu = { folder = "...", weight = 2 }."""
    tokenizer: str | None = None
    """The tokenizer's folder, for a model from scratch (none: the one beside the data)."""
    packing: Literal["concat", "documents"] = Field("concat", description="how documents fill rows: end to end, or whole ones first-fit")
    seed: int = Field(0, ge=0, le=(1 << 63) - 1)
    """Seed of the order of documents and rows."""


class OptimizerConfig(Config):
    """Which optimizer. Options left at none take the optimizer's own default; one that it does not have is refused."""

    name: Literal["adamw", "muon", "lion", "adafactor"] = Field("adamw", description="adamw, muon, lion or adafactor")
    lr: float | None = Field(None, gt=0, le=100)
    """Learning rate at the schedule's top (none: 1e-3 for adamw and muon, 1e-4 for lion, 1e-2 for adafactor)."""
    weight_decay: float | None = Field(None, ge=0, le=10)
    """Decoupled decay of matrices; vectors are never decayed (none: 0.1, adafactor 0)."""
    betas: tuple[float, float] | None = None
    """Decay of the first and second moment (adamw, muon's adamw, lion)."""
    eps: float | None = Field(None, gt=0, le=1)
    """Added to the root of the second moment (adamw, muon's adamw)."""
    momentum: float | None = Field(None, ge=0, lt=1)
    """Muon's momentum."""
    beta1: float | None = Field(None, ge=0, lt=1)
    """Adafactor's first moment (none: it keeps none)."""
    scale_parameter: bool | None = None
    """Adafactor: whether the learning rate is relative to a parameter's size."""
    clip_threshold: float | None = Field(None, gt=0)
    """Adafactor: bound on an update's root mean square."""

    @model_validator(mode="after")
    def _known_options(self) -> OptimizerConfig:
        for name in type(self).model_fields:
            if name not in ("name", "lr") and getattr(self, name) is not None and name not in _OPTIONS[self.name]:
                raise InputError(f"{self.name} has no {name}", f"its options: {', '.join(_OPTIONS[self.name])}", field=f"optimizer.{name}")
        if self.betas is not None and not all(0 <= beta < 1 for beta in self.betas):
            raise InputError(f"betas are {self.betas}", "give two numbers from 0 to below 1", field="optimizer.betas")
        return self

    def options(self) -> dict[str, Any]:
        """Every option of the optimizer by name, defaults filled in; `lr` too."""
        given = {name: getattr(self, name) for name in _OPTIONS[self.name]}
        own = {name: _OPTIONS[self.name][name] if value is None else value for name, value in given.items()}
        return {"lr": self.lr if self.lr is not None else _LEARNING_RATES[self.name], **own}


class ScheduleConfig(Config):
    """The learning rate over the run."""

    name: ScheduleName = Field("cosine", description="constant, linear, cosine, or wsd: warm-up, stable, decay")
    warmup: int | None = Field(None, ge=0)
    """Steps of warm-up (none: a twentieth of the run)."""
    final: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate that is left at the end."""
    decay: int | None = Field(None, ge=1)
    """wsd: steps of decay at the end (none: a fifth of the run)."""
    decay_shape: Literal["linear", "sqrt"] = Field("sqrt", description="wsd: straight down, or 1 - sqrt")


class EvaluateConfig(Config):
    """Perplexity on text that is not trained on: before the first step, after the last, and between."""

    every: int = Field(0, ge=0)
    """Steps between evaluations (0: only before and after)."""
    batches: int = Field(16, ge=1)
    """Batches of micro_rows rows that an evaluation reads, always the same ones."""
    split: str = "validation"
    """Which split of the data."""


class CheckpointConfig(Config):
    """When the state of a run is saved; it always is at the end and on Ctrl-C."""

    every: int = Field(100, ge=0)
    """Steps between checkpoints, written in the background (0: only at the end; also before each evaluation once it is not 0)."""
    keep: int = Field(2, ge=1, le=1000)
    """Newest checkpoints that are kept."""


class MemoryConfig(Config):
    """What is traded for memory: activations that the backward pass computes again. Never the result."""

    checkpointing: Literal["none", "selective", "attention", "full", "budget"] = Field(
        "none", description="what blocks keep: all, products and attention, attention, only their input, or what fits memory.budget"
    )
    """What a block keeps for the backward pass."""
    budget: int | None = Field(None, ge=1)
    """Bytes that the activations of one micro-batch may take (checkpointing = "budget"): the least is computed again."""

    @model_validator(mode="after")
    def _budget_is_used(self) -> MemoryConfig:
        if (self.checkpointing == "budget") != (self.budget is not None):
            raise InputError(
                f"memory.checkpointing = {self.checkpointing!r} and memory.budget = {self.budget}",
                "give a budget in bytes with checkpointing = 'budget', and only there",
                field="memory.budget",
            )
        return self


class TrainConfig(Config):
    """Everything that `armillary train` may be told."""

    model: str | None = None
    """What to fine-tune: a name (smollm2), a .gguf file or a model folder; none: a new model of [architecture]."""
    steps: int = Field(200, ge=1, le=1 << 40)
    """Optimizer steps."""
    clip_norm: float | None = Field(1.0, gt=0)
    """Bound on the gradient's norm (none: no clipping)."""
    precision: PrecisionName = Field("fp32", description="what the passes compute in; master weights and optimizer stay fp32")
    loss_scale: float = Field(65536.0, gt=0)
    """fp16: the first loss scale; it halves at overflows and doubles after 2,000 clean steps."""
    layout: str = ""
    """How the model lies over ranks, such as "dp_shard=2,tp=2" (start with torchrun); empty: one process."""
    seed: int = Field(0, ge=0, le=(1 << 63) - 1)
    """Seed of a new model's weights."""
    threads: int | None = Field(None, ge=1, le=1024)
    """Threads of one process (none: one a core)."""
    architecture: ArchitectureConfig = ArchitectureConfig.model_validate({})
    data: DataConfig = DataConfig.model_validate({})
    batch: BatchConfig = BatchConfig.model_validate({})
    optimizer: OptimizerConfig = OptimizerConfig.model_validate({})
    schedule: ScheduleConfig = ScheduleConfig.model_validate({})
    evaluate: EvaluateConfig = EvaluateConfig.model_validate({})
    checkpoint: CheckpointConfig = CheckpointConfig.model_validate({})
    memory: MemoryConfig = MemoryConfig.model_validate({})

    @model_validator(mode="after")
    def _one_model(self) -> TrainConfig:
        if self.model is not None and (given := self.architecture.model_fields_set):
            raise InputError(
                f"model = {self.model!r} has an architecture of its own, and architecture.{min(given)} is given too",
                "leave [architecture] out to fine-tune, or model out to train from scratch",
                field="architecture",
            )
        return self
