"""One curve: the acceptance run of a layout. Every layout trains the same small model on the same batches, and its losses are compared.

The models are two layers with every feature of the family; the micro-batches of a step have different lengths,
documents and numbers of scored targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.train.microbatch import IGNORED, MicroBatch, scored
from armillary.train.optimizers.adamw import AdamW
from armillary.train.parallel.apply import NamedParameters, OptimizerFactory, Parallel, Single, TokenLoss
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.local_tensor import by_rank, local_ranks, rank_values
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.zero import ZeroExecutor
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

_LLAMA = ModelConfig("llama", 56, 16, 24, 2, 8, 2, 4, 64)
FAMILIES: dict[str, ModelConfig] = {
    "llama": replace(_LLAMA, rope=RopeConfig(kind="llama3", factor=8.0, original_context=16)),
    "qwen2": replace(_LLAMA, architecture="qwen2", num_kv_heads=8, qkv_bias=True, tie_embeddings=True),
    "qwen3": replace(_LLAMA, architecture="qwen3", qk_norm=True, num_kv_heads=1),
    "gemma2": replace(
        _LLAMA,
        architecture="gemma2",
        windows=(3, None),
        attention_softcap=20.0,
        logit_softcap=5.0,
        sandwich_norms=True,
        norm_offset=1.0,
        embedding_scale=4.0,
        activation="gelu_tanh",
        tie_embeddings=True,
    ),
}
FAMILIES["everything"] = replace(FAMILIES["gemma2"], architecture="llama", qk_norm=True, qkv_bias=True, o_bias=True, mlp_bias=True)


@dataclass(frozen=True, slots=True)
class Curve:
    """What a run is compared by: the loss and the gradient norm of every step, and the parameters after the last, whole."""

    losses: tuple[float, ...]
    norms: tuple[float, ...]
    parameters: dict[str, Tensor]

    def loss_difference(self, other: Curve) -> float:
        """The largest difference of a step's loss, in nats a token."""
        return max(abs(a - b) for a, b in zip(self.losses, other.losses, strict=True))

    def parameter_difference(self, other: Curve) -> float:
        """The largest difference of a parameter after the last step."""
        return max(float((value - other.parameters[name]).abs().max()) for name, value in self.parameters.items())

    def same_bits(self, other: Curve) -> bool:
        """Whether losses and parameters are equal to the last bit (zeros may differ in sign)."""
        return self.losses == other.losses and all(torch.equal(value, other.parameters[name]) for name, value in self.parameters.items())


def small_decoder(config: ModelConfig) -> Decoder:
    """The same weights wherever it is made; biases and norms off their starting points, so that they matter."""
    generator = torch.Generator().manual_seed(7)
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = (
                1.0 - config.norm_offset if parameter.ndim == 1 and parameter.shape[0] in (config.hidden_size, config.head_dim) else 0.0
            )
            parameter.copy_(offset + 0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def global_batch(step: int, vocabulary: int, microbatches: int, alike: bool = False) -> list[MicroBatch]:
    """The micro-batches of a step. alike: all of the same lengths and numbers of scored targets, as simulated ranks need."""
    batch = []
    for index in range(microbatches):
        generator = torch.Generator().manual_seed(100 * step + index)
        size = 11 if alike else 5 + (3 * index + step) % 9
        tokens = torch.randint(0, vocabulary, (size,), generator=generator)
        targets = torch.randint(0, vocabulary, (size,), generator=generator)
        targets[: 2 if alike else index % 4] = IGNORED
        positions = torch.cat((torch.arange(4), torch.arange(size - 4)))
        batch.append(MicroBatch(tokens, targets, positions, (4, size - 4)))
    return batch


def plain_adamw(named: NamedParameters) -> torch.optim.Optimizer:
    """AdamW in torch's plain order of operations, everything decayed alike."""
    return AdamW([parameter for _, parameter in named if parameter.requires_grad], lr=1e-3, fused=False)


def train(
    parallel: Parallel,
    config: ModelConfig,
    *,
    microbatches: int,
    steps: int = 3,
    clip_norm: float | None = None,
    optimizer: OptimizerFactory = plain_adamw,
) -> Curve:
    """Trains on this rank's share of every step's micro-batches, through the trainer itself."""
    trainer = Trainer(parallel, optimizer, Schedule("constant", steps), _NoBatches(), clip_norm=clip_norm)
    share = microbatches // parallel.dp_world
    results = []
    for step in range(steps):
        begin = parallel.dp_rank * share
        results.append(trainer.step(global_batch(step, config.vocab_size, microbatches)[begin : begin + share]))
    return Curve(tuple(r.loss for r in results), tuple(r.gradient_norm for r in results), whole_parameters(parallel.named_parameters()))


def whole_parameters(named: Any) -> dict[str, Tensor]:
    """Every parameter gathered from its shards."""
    return {name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone() for name, parameter in named}


def single_curve(config: ModelConfig, **options: Any) -> Curve:
    """The reference: one process."""
    return train(Single(small_decoder(config)), config, **options)


def layout_curve(layout: Layout, config: ModelConfig, *, replicas: Any = "torch", **options: Any) -> Curve:
    """A rank's run under `layout`, in whichever process group is there."""
    return train(parallelize(small_decoder(config), layout, replicas=replicas), config, **options)


def zero_curve(stage: Any, rank: int, config: ModelConfig, *, microbatches: int, steps: int = 3) -> Curve:
    """A rank's run of the reference executor at a ZeRO stage, one micro-batch a rank. Norms are not its business."""
    module = TokenLoss(small_decoder(config))
    optimizer = partial(AdamW, lr=1e-3, fused=False)
    zero = ZeroExecutor(module, list(module.model.layers), stage, optimizer, rank, microbatches)
    losses = []
    for step in range(steps):
        batch = global_batch(step, config.vocab_size, microbatches)
        part, count = batch[rank], scored(batch)
        loss = module(part.tokens, part.positions, part.targets, part.attend)
        (loss / count).backward()
        zero.step()
        total = loss.detach().double()
        dist.all_reduce(total)
        losses.append(float(total) / count)
    zero.gather_all()
    return Curve(tuple(losses), (), {name.removeprefix("model."): value.detach().clone() for name, value in module.named_parameters()})


def simulated_curves(layout: Layout, config: ModelConfig, *, microbatches: int, steps: int = 3) -> tuple[Curve, Curve]:
    """(one process, `layout` on LocalTensor's ranks), by the plain loop that both can run. Needs no other process."""
    batches = [global_batch(step, config.vocab_size, microbatches, alike=True) for step in range(steps)]
    reference = _plain_loop(Single(small_decoder(config)), batches)
    model = small_decoder(config)  # made outside: inside, everything is made for all simulated ranks already
    with local_ranks(layout.world) as mode:
        parallel = parallelize(on_simulated_ranks(model, mode), layout, replicas="buckets")
        per_rank = [_one_microbatch_a_rank(layout, batch, mode) for batch in batches]
        simulated = _plain_loop(parallel, per_rank)
    return reference, simulated


def on_simulated_ranks(model: Decoder, mode: Any) -> Decoder:
    """`model` with every simulated rank holding its own copy of each parameter."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            whole = parameter.detach()
            copies = by_rank(mode, lambda _, whole=whole: whole.clone())  # type: ignore[misc]
            module.register_parameter(name, nn.Parameter(copies, parameter.requires_grad))
    model.tie()
    return model


def _one_microbatch_a_rank(layout: Layout, batch: Sequence[MicroBatch], mode: Any) -> list[Any]:
    """A step's micro-batches as tensors that differ between simulated data-parallel ranks; as many as each rank has."""
    share = len(batch) // layout.dp

    def stacked(name: str, number: int) -> Tensor:
        return by_rank(mode, lambda rank: getattr(batch[rank // layout.tp * share + number], name).clone())

    return [_Simulated(stacked("tokens", n), stacked("targets", n), stacked("positions", n), batch[0].attend) for n in range(share)]


@dataclass(frozen=True, slots=True)
class _Simulated:
    tokens: Tensor
    targets: Tensor
    positions: Tensor
    attend: Any


def _plain_loop(parallel: Parallel, batches: Sequence[Sequence[Any]]) -> Curve:
    """Training without the trainer's decisions, which a simulated rank cannot take."""
    parameters = [parameter for _, parameter in parallel.named_parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, foreach=False)
    count = parallel.dp_world * len(batches[0]) * int((_first(batches[0][0].targets) != IGNORED).sum())
    losses, norms = [], []
    for batch in batches:
        optimizer.zero_grad()
        total = torch.zeros(())
        for number, part in enumerate(batch):
            with parallel.sync_gradients(number == len(batch) - 1):
                loss = parallel.loss_sum(part.tokens, part.positions, part.targets, part.attend) / count
                loss.backward()  # type: ignore[no-untyped-call]
            total = total + loss.detach()
        losses.append(float(_first(parallel.sum_over_dp(total))))
        norms.append(float(_first(parallel.gradient_norm(parameters))))
        optimizer.step()
    return Curve(
        tuple(losses), tuple(norms), {name: _first(value) for name, value in whole_parameters(parallel.named_parameters()).items()}
    )


def _first(tensor: Tensor) -> Tensor:
    """Simulated rank 0's value of what all of them hold; a plain tensor as it is."""
    return rank_values(tensor)[0] if hasattr(tensor, "_local_tensors") else tensor


class _NoBatches:
    """The trainer is stepped by hand here."""

    def __iter__(self) -> Iterator[Sequence[MicroBatch]]:
        return self

    def __next__(self) -> Sequence[MicroBatch]:
        raise StopIteration

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
