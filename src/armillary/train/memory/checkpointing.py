"""Activation checkpointing (Chen et al. 2016): what a block keeps for backward, and what it computes again.

A level says whose results are kept: `none` everything; `selective` those of products and attention (norms, rotations and gates are
computed again); `attention` those of attention; `full` only the block's input. A plan is a level a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import flop_registry

from armillary.core.errors import InputError
from armillary.core.units import format_bytes
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.decoder import Block, Decoder
from armillary.train.memory.counter import Alive

Level = Literal["none", "selective", "attention", "full"]
LEVELS: Final[tuple[Level, ...]] = ("none", "selective", "attention", "full")
BALANCE: Final = 10.0
"""FLOPs that a machine does in the time of writing a byte: what an operation without products costs to compute again."""
_UNITS: Final = 2000  # the budget's resolution

_PRODUCTS: Final = ("mm", "addmm", "bmm", "baddbmm", "_linear_pointwise")  # the last is oneDNN's
_ATTENTION: Final = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_fused_attention_overrideable", "causal_attention",
)  # fmt: skip
_KEPT: Final[dict[str, tuple[str, ...]]] = {"selective": _PRODUCTS + _ATTENTION, "attention": _ATTENTION}


@dataclass(frozen=True, slots=True)
class Option:
    """A level of one block: bytes that it keeps, and what computing the rest again costs, in FLOPs."""

    level: Level
    bytes: int
    cost: float


def apply_checkpointing(model: Decoder, plan: Sequence[Level]) -> None:
    """Makes each block compute again what its level does not keep. Losses and gradients stay the same, and so do the parameters' names.

    Before any parallelism is applied: gathering and splitting then happen around what is computed twice.
    """
    for block, level in zip(model.layers, plan, strict=True):
        _checkpoint(block, level)


def _checkpoint(block: nn.Module, level: Level) -> None:
    """Its forward alone is replaced: a wrapping module would rename the parameters."""
    if level != "none":
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **_contexts(level))


def measure_options(config: ModelConfig, lengths: Sequence[int], dtype: torch.dtype = torch.float32) -> list[list[Option]]:
    """For every block, what each level keeps and costs for one micro-batch of documents of these lengths. Runs on fake tensors."""
    known: dict[int | None, list[Option]] = {}
    for layer in range(config.num_layers):
        if config.window(layer) not in known:
            known[config.window(layer)] = [_measure(config, layer, tuple(lengths), dtype, level) for level in LEVELS]
    return [known[config.window(layer)] for layer in range(config.num_layers)]


def plan_for_budget(options: Sequence[Sequence[Option]], budget: int) -> tuple[Level, ...]:
    """The levels that recompute least among those that keep at most `budget` bytes in all: a multiple-choice knapsack, solved exactly.

    Bytes are rounded up to a 2,000th of the budget. Raises InputError when even the smallest levels keep more.
    """
    least = sum(min(option.bytes for option in block) for block in options)
    if least > budget:
        raise InputError(
            f"memory.budget = {format_bytes(budget)} is below the {format_bytes(least)} that the blocks' inputs take",
            "raise it, or lower batch.micro_rows",
            field="memory.budget",
        )
    unit = budget / (_UNITS + len(options)) or 1.0  # one unit a block to spare, which is what rounding up may take
    limit = _UNITS + len(options)
    best: dict[int, tuple[float, tuple[Level, ...]]] = {0: (0.0, ())}  # units used -> cost, levels
    for block in options:
        following: dict[int, tuple[float, tuple[Level, ...]]] = {}
        for used, (cost, levels) in best.items():
            for option in block:
                units = used + _rounded_up(option.bytes, unit)
                candidate = cost + option.cost, (*levels, option.level)
                if units <= limit and (units not in following or candidate[0] < following[units][0]):
                    following[units] = candidate
        best, lowest = {}, float("inf")
        for units in sorted(following):  # more units for no less cost are never better
            if following[units][0] < lowest:
                best[units] = following[units]
                lowest = following[units][0]
    if not best:  # only rounding is in the way
        return tuple(min(block, key=lambda option: option.bytes).level for block in options)
    return min(best.values(), key=lambda found: found[0])[1]


def _rounded_up(size: int, unit: float) -> int:
    return int(-(-size // unit))


def _contexts(level: Level) -> dict[str, Any]:
    if level == "full":
        return {}
    policy = _policy(level)
    return {"context_fn": partial(create_selective_checkpoint_contexts, policy)}


def _policy(level: Level) -> Callable[..., CheckpointPolicy]:
    kept = _KEPT[level]

    def policy(_: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if _name(operation) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return policy


def _name(operation: Any) -> str:
    return str(getattr(operation, "overloadpacket", operation)).split(".")[-1]


def _measure(config: ModelConfig, layer: int, lengths: tuple[int, ...], dtype: torch.dtype, level: Level) -> Option:
    with FakeTensorMode():
        block = Block(config, layer)
        weights = {name: weight.to(dtype) for name, weight in block.named_parameters()}
        tokens = sum(lengths)
        x = torch.zeros(tokens, config.hidden_size, dtype=dtype, requires_grad=True)
        angles = (torch.zeros(tokens, 1, config.head_dim, dtype=dtype), torch.zeros(tokens, 1, config.head_dim, dtype=dtype))
        _checkpoint(block, level)
        with Alive([*weights.values(), *angles]) as alive, _Cost(level) as cost:
            before = alive.bytes
            out = torch.func.functional_call(block, weights, (x * 1.0, angles, CausalAttend(lengths)))
        # The input is alive only if the block keeps it; the output is the next block's input.
        kept = alive.bytes - before - out.untyped_storage().nbytes()
    return Option(level, kept, cost.total)


class _Cost(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a level computes again of a forward pass: FLOPs of products and attention, and BALANCE a byte that the others write."""

    def __init__(self, level: Level) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.level, self.total = level, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.level != "none" and _name(func) not in _KEPT.get(self.level, ()):
            if _name(func) == "causal_attention":
                q, lengths = args[0], args[3]  # q: [T, H, D]; the causal half counts too
                self.total += 4.0 * q[0].numel() * sum(length**2 for length in lengths)
            elif _name(func) in _ATTENTION:
                self.total += 4.0 * args[0].numel() * args[1].shape[-2]  # q: [B, H, L, D], k: [B, H', L, D]; the causal half counts too
            elif _name(func) == "_linear_pointwise":
                self.total += 2.0 * out.numel() * args[0].shape[-1]
            elif (count := flop_registry.get(func.overloadpacket)) is not None:
                self.total += count(*args, **(kwargs or {}), out_val=out)
            elif isinstance(out, torch.Tensor) and not func.is_view:
                self.total += BALANCE * out.nbytes
        return out
