"""From a configuration to a run that is ready to step: the model, its tokenizer, the data, the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from armillary.core.allocator import keep_memory
from armillary.core.errors import InputError, NotFoundError
from armillary.core.trace import Trace
from armillary.data.batches import Source
from armillary.data.mixture import Mixture, Part
from armillary.data.shards import TokenShards
from armillary.data.tokenizer_identity import require_tokenizer, tokenizer_identity
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.models.load import load
from armillary.models.tokenizer import Tokenizer
from armillary.train.batches import RowBatches, rows_of_a_rank
from armillary.train.config import ArchitectureConfig, ScheduleConfig, TrainConfig
from armillary.train.evaluate import Evaluation, evaluate
from armillary.train.memory.checkpointing import Level, apply_checkpointing, measure_options, plan_for_budget
from armillary.train.memory.predict import Prediction, predict
from armillary.train.optimizers import choose
from armillary.train.parallel.apply import Parallel, Single
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.precision import COMPUTE, LossScaler
from armillary.train.schedules import Schedule
from armillary.train.trainer import Checkpoints, Hooks, Trainer


@dataclass(frozen=True, slots=True)
class Run:
    """A trainer and what it was made of. `validation` is None where the data has no such split; `plan`: what each block computes again."""

    config: TrainConfig
    decoder: Decoder
    tokenizer: Tokenizer
    parallel: Parallel
    trainer: Trainer
    train: Source
    validation: Source | None
    plan: tuple[Level, ...]

    def evaluate(self) -> Evaluation | None:
        """Perplexity on the validation split."""
        if self.validation is None:
            return None
        batch, count = self.config.batch, self.config.evaluate.batches
        return evaluate(self.parallel, self.validation, rows=batch.micro_rows, length=batch.length, batches=count)

    def sources(self) -> dict[str, Any]:
        """JSON data: what each split holds, and of a mixture what came out of its shares."""
        opened = {"train": self.train} | ({} if self.validation is None else {self.config.evaluate.split: self.validation})
        return {
            split: {
                "fingerprint": source.fingerprint,
                "tokenizer": source.tokenizer,
                "documents": len(source.lengths),
                "tokens": int(source.lengths.sum()),
                **({"mixture": source.resolved} if isinstance(source, Mixture) else {}),
            }
            for split, source in opened.items()
        }

    @property
    def tokens_per_step(self) -> int:
        """At most: rows that end early are shorter."""
        return self.config.batch.rows * self.config.batch.length


def build(
    config: TrainConfig,
    *,
    checkpoints: Checkpoints | None = None,
    hooks: Hooks | None = None,
    trace: Trace | None = None,
    dry: bool = False,
) -> Run:
    """Loads or makes the model, opens the data, and checks that they belong together. dry: without the layout's other ranks, not to be run.

    Raises InputError or NotFoundError for what does not: another tokenizer, rows beyond the context, a split that is missing.
    """
    keep_memory()
    tokenizer, decoder = open_model(config)
    if config.batch.length > decoder.config.max_context:
        raise InputError(
            f"batch.length = {config.batch.length:,} is beyond the model's context of {decoder.config.max_context:,}",
            "shorten the rows, or train a model with a longer context",
            field="batch.length",
        )
    train = open_source(config, "train", tokenizer)
    try:
        validation: Source | None = open_source(config, config.evaluate.split, tokenizer)
    except NotFoundError:
        if config.evaluate.every:
            raise
        validation = None
    plan = checkpointing_plan(config, decoder.config)
    apply_checkpointing(decoder, plan)
    layout = Layout.parse(config.layout)
    if dry:
        layout.check_model(decoder.config)
        rows_of_a_rank(config.batch, layout.dp)
    parallel: Parallel = Single(decoder) if dry else parallelize(decoder, layout, compute_dtype=COMPUTE[config.precision])
    batches = RowBatches(
        train, config.batch, seed=config.data.seed, packing=config.data.packing, rank=parallel.dp_rank, world=parallel.dp_world
    )
    trainer = Trainer(
        parallel,
        choose.factory(config.optimizer),
        schedule(config.schedule, config.steps),
        batches,
        clip_norm=config.clip_norm,
        scaler=LossScaler(config.loss_scale) if config.precision == "fp16" else None,
        checkpoints=checkpoints,
        hooks=hooks,
        trace=trace,
    )
    return Run(config, decoder, tokenizer, parallel, trainer, train, validation, plan)


def schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The schedule with what was left open settled: a twentieth of the run warms up, a fifth of it decays (wsd)."""
    warmup = steps // 20 if config.warmup is None else config.warmup
    decay = config.decay if config.decay is not None else steps // 5 if config.name == "wsd" else 0
    return Schedule(config.name, steps, warmup, config.final, decay, config.decay_shape)


def checkpointing_plan(config: TrainConfig, model: ModelConfig) -> tuple[Level, ...]:
    """A level a block. A budget is for the longest micro-batch: full rows of one document each."""
    level = config.memory.checkpointing
    if level != "budget":
        return (level,) * model.num_layers
    assert config.memory.budget is not None
    dtype = COMPUTE[config.precision] or torch.float32
    return plan_for_budget(measure_options(model, [config.batch.length] * config.batch.micro_rows, dtype), config.memory.budget)


def predict_memory(config: TrainConfig, model: ModelConfig) -> Prediction:
    """Of a step with full rows, on a rank that shares nothing with the others."""
    batch, share = config.batch, rows_of_a_rank(config.batch, Layout.parse(config.layout).dp)
    rows = min(batch.micro_rows, share)
    return predict(
        model,
        [batch.length] * rows,
        config.optimizer.name,
        micro_batches=share // rows,
        plan=checkpointing_plan(config, model),
        compute_dtype=COMPUTE[config.precision],
        beta1=config.optimizer.beta1 is not None,
    )


def new_model_config(architecture: ArchitectureConfig, tokenizer: Tokenizer, length: int) -> ModelConfig:
    """The shape of a new model whose vocabulary is the tokenizer's."""
    sizes = architecture
    if sizes.head_dim is None and sizes.hidden % sizes.heads:
        raise InputError(
            f"architecture.hidden = {sizes.hidden} does not divide into {sizes.heads} heads",
            "choose a multiple, or give architecture.head_dim",
            field="architecture.heads",
        )
    return ModelConfig(
        "qwen3" if sizes.qk_norm else "llama",
        tokenizer.vocab_size,
        sizes.hidden,
        sizes.intermediate or -(-8 * sizes.hidden // (3 * 64)) * 64,
        sizes.layers,
        sizes.heads,
        sizes.kv_heads or sizes.heads,
        sizes.head_dim or sizes.hidden // sizes.heads,
        sizes.context or length,
        rope=RopeConfig(sizes.rope_theta),
        tie_embeddings=sizes.tie_embeddings,
        qk_norm=sizes.qk_norm,
        activation=sizes.activation,
        bos_token_id=tokenizer.bos,
        eos_token_ids=tuple(sorted(tokenizer.stop_ids)),
    )


def open_source(config: TrainConfig, split: str, tokenizer: Tokenizer) -> Source:
    """The data's split: one folder, or the mixture. Its tokens must be the model's tokenizer's."""
    data = config.data
    if (data.folder is None) == (not data.mixture):
        raise InputError("the data is not settled", "give either data.folder or a [data.mixture]", field="data.folder")
    if data.folder is not None:
        return _shards(data.folder, split, tokenizer)
    parts = [
        Part(name, _shards(part.folder, split, tokenizer), part.weight, part.fraction, part.count) for name, part in data.mixture.items()
    ]
    return Mixture(parts)


def _shards(folder: str, split: str, tokenizer: Tokenizer) -> TokenShards:
    shards = TokenShards.open(Path(folder).expanduser(), split)
    require_tokenizer(shards.tokenizer, tokenizer, str(shards.folder))
    return shards


def open_model(config: TrainConfig) -> tuple[Tokenizer, Decoder]:
    if config.model is not None:
        loaded = load(config.model)
        return loaded.tokenizer, loaded.decoder.float().train()
    tokenizer = _tokenizer(config)
    torch.manual_seed(config.seed)
    return tokenizer, Decoder(new_model_config(config.architecture, tokenizer, config.batch.length))


def _tokenizer(config: TrainConfig) -> Tokenizer:
    """The one that is named, or the one beside the data: of a mixture, all parts must have the same."""
    if config.data.tokenizer is not None:
        return Tokenizer.from_json(Path(config.data.tokenizer).expanduser())
    folders = [config.data.folder] if config.data.folder is not None else [part.folder for part in config.data.mixture.values()]
    if not folders:
        raise InputError("a new model needs data with a tokenizer", "give data.folder (armillary data prepare)", field="data.folder")
    found = [Tokenizer.from_json(Path(folder).expanduser() / "tokenizer") for folder in folders]
    if len({tokenizer_identity(tokenizer) for tokenizer in found}) > 1:
        raise InputError(f"the mixture's {len(folders)} folders have different tokenizers", "prepare them with one", field="data.mixture")
    return found[0]
