"""Where a model's weights, keys and activations lie when the accelerator cannot hold them: FlexGen's search (Sheng et al., ICML 2023, section 4.3).

For every size of block and batch a linear program finds the nine percentages (`serve.offload.placement`). On a T4 rates are FlexGen's fit; elsewhere they
are the catalogue's or a profile's: links as they are, products at what the device attains or, for few sequences, at what reading the weights takes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product
from typing import Final

import numpy as np

from armillary.core.errors import CapacityError, InputError
from armillary.core.units import format_bytes
from armillary.models.config import ModelConfig
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.spread import check
from armillary.plan.offload_place import Place
from armillary.serve.offload.cost import Price, Work, peak_rows, price
from armillary.serve.offload.layout import Bounds, layout
from armillary.serve.offload.placement import Placement, best_fractions
from armillary.serve.offload.policy import MAX_BATCHES, OffloadPolicy, Split, Tier

BLOCK_SIZE: Final = 16  # tokens a KV block of the engine


def work_of(model: Architecture, place: Place, prompt: int, answer: int, compressed: bool) -> Work:
    """One sequence of the model's layers. Raises InputError for what the cost model does not know."""
    check(model)
    for name, value in (("prompt", prompt), ("answer", answer)):
        if not 1 <= value <= 1 << 20:
            raise InputError(f"{name} is {value:,} tokens", f"give 1 to {1 << 20:,}", field=name)
    if prompt + answer > model.max_context:
        raise InputError(
            f"{prompt:,} and {answer:,} tokens are more than the {model.max_context:,} of {model.name}",
            "shorten prompt or answer",
            field="prompt",
        )
    work = Work(
        model.num_layers, model.hidden_size, model.intermediate_size, model.num_heads, prompt, answer, 1, 1, compressed,
        model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim, 3 if model.gated else 2, place.element,
    )  # fmt: skip
    # FlexGen's fit is of its model, which has no head.
    return work if place.fitted else replace(work, head=model.vocab_size * model.hidden_size / work.numbers)


@dataclass(frozen=True)
class Found:
    """The best block, and the best of every size that fits. `policy` is what the engine is told: whole percents, which `price` is of."""

    place: Place
    best: Placement
    policy: OffloadPolicy
    price: Price
    tried: tuple[Placement, ...]


def search(work: Work, place: Place, config: ModelConfig | None = None, *, most: int = 1024) -> Found:
    """Blocks of up to `most` sequences. With `config` the best that the engine has room for too: arena shares go to RAM or disk until its buffers fit.

    Raises CapacityError with what is short and what would fit.
    """
    if not 1 <= most <= 1 << 16:
        raise InputError(f"blocks of {most:,} sequences", f"give 1 to {1 << 16:,}", field="block")
    tried = sorted(_placements(work, place, _sizes(most)), key=lambda one: -one.price.throughput)
    for one in tried:
        policy = settled(one, place, config)
        if policy is not None:
            cost = price(one.work, policy.weights, policy.cache, policy.hidden, place.hardware(one.work))
            return Found(place, one, policy, cost, tuple(tried))
    if tried:
        assert config is not None
        smallest = min(tried, key=lambda one: one.work.block)
        layout(config, _rounded(smallest, 0.0, Tier.RAM), bounds(smallest.work)).check(place.arena)
    raise too_large(work, place)


def _sizes(most: int) -> Iterable[tuple[int, int]]:
    """(block, batch): batches of 1, 2, 3, 4, 6, 8, 12, ..., and as many of them."""
    steps = sorted(step << power for power in range(most.bit_length()) for step in (1, 3) if step << power <= most)
    return [(batch * count, batch) for batch in steps for count in steps if batch * count <= most and count <= MAX_BATCHES]


def _placements(work: Work, place: Place, sizes: Iterable[tuple[int, int]]) -> list[Placement]:
    found = []
    for block, batch in dict.fromkeys(sizes):
        sized = replace(work, block=block, batch=batch)
        try:
            found.append(best_fractions(sized, place.hardware(sized)))
        except CapacityError:
            continue
    return found


def bounds(work: Work) -> Bounds:
    """The engine's largest iteration for such a block: all its prompts at once."""
    context = work.prompt + work.answer
    return Bounds(work.block * -(-context // BLOCK_SIZE), BLOCK_SIZE, work.block, work.block * work.prompt, context)


def settled(placement: Placement, place: Place, config: ModelConfig | None) -> OffloadPolicy | None:
    """Whole percents; for the engine with as much of the arena as its own count leaves, the rest where there is room. None where not even its buffers fit."""
    if config is None:
        return _rounded(placement, 1.0, Tier.RAM)
    rows = peak_rows(placement.work, place.hardware(placement.work))
    for kept, tier in product(np.linspace(1.0, 0.0, 21), (Tier.RAM, Tier.DISK)):
        policy = _rounded(placement, float(kept), tier)
        at = np.array([1.0, *policy.weights.shares, *policy.cache.shares, *policy.hidden.shares])
        behind = all(used @ at <= limit * 1.01 for name, (used, limit) in rows.items() if not name.startswith("arena"))
        if behind and layout(config, policy, bounds(placement.work)).total <= place.arena:
            return policy
    return None


def _rounded(placement: Placement, kept: float, tier: Tier) -> OffloadPolicy:
    """Whole percents, the arena's never more than they were, with `kept` of its weights and cache there and the rest in `tier`."""

    def whole(split: Split, share: float) -> Split:
        parts = [split.arena * share, split.ram, split.disk]
        parts[tier] += split.arena * (1 - share)
        floors = [math.floor(100 * part + 1e-9) for part in parts]
        behind = sorted((Tier.RAM, Tier.DISK), key=lambda one: floors[one] - 100 * parts[one])
        for turn in range(100 - sum(floors)):
            floors[behind[turn % 2]] += 1
        return Split(*(part / 100 for part in floors))

    work = placement.work
    return OffloadPolicy(
        whole(placement.weights, kept),
        whole(placement.cache, kept),
        whole(placement.hidden, 1.0),
        work.block // work.batch,
        work.compressed,
    )


def too_large(work: Work, place: Place) -> CapacityError:
    """What one sequence at a time lacks."""
    one = replace(work, block=1, batch=1)
    hardware = place.hardware(one)
    cache = 2 * one.element * (one.prompt + one.answer) * one.widths[1] * one.layers * one.kept
    weights = (one.layers + one.head) * one.layer_bytes * one.kept
    room = hardware.margin * (hardware.arena + hardware.ram + hardware.disk)
    compress = "" if work.compressed else ", --compress int4"
    if weights + cache > room:
        return CapacityError(
            f"weights of {format_bytes(weights)} and {format_bytes(cache)} of keys and values of one sequence are {format_bytes(weights + cache - room)} more than "
            f"{hardware.margin:.0%} of the accelerator's {format_bytes(place.arena)}, {format_bytes(place.ram)} of RAM and {format_bytes(place.disk)} of disk",
            f"give {format_bytes((weights + cache - room) / hardware.margin)} more (--memory, --disk){compress}, or choose a smaller model",
            field="memory",
        )
    least = max(used[0] for name, (used, _) in peak_rows(one, hardware).items() if name.startswith("arena"))
    if least > hardware.margin * hardware.arena:
        return CapacityError(
            f"one sequence's buffers take {format_bytes(least)} of the accelerator with everything else elsewhere, {format_bytes(least - hardware.margin * hardware.arena)} more than "
            f"{hardware.margin:.0%} of its {format_bytes(place.arena)}",
            f"give at least {format_bytes(least / hardware.margin)} (--accelerator-memory), or shorten the prompt",
            field="accelerator_memory",
        )
    return CapacityError(
        f"what passes through RAM on its way does not fit {hardware.margin:.0%} of {format_bytes(place.ram)} beside what lives there",
        f"give more RAM (--memory){compress}",
        field="memory",
    )
