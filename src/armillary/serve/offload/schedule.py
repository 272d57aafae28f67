"""The zig-zag block schedule as data: what is computed, what moves meanwhile, and what each computation waits for.

Sheng et al., "FlexGen" (ICML 2023), algorithm 1. A unit of weights (a layer, a piece of the head) stays while every batch of the block
passes it, so its load is shared by all of them; the next unit is loaded and the neighbours' states are moved beside the computation:

    step      (u, k-1)     (u, k)                    (u, k+1)
    weights   |------------ load u+1, over all batches of u -------------|
    state                  store k-1, load k+1       store k, load k+2

Weights have one lane and the batches' keys, values and activations another. A lane carries its moves out in order, and has two
buffers that take turns, so a load begins as soon as its buffer has been left by the step before the last that used one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

What = Literal["weights", "cache", "hidden"]


class Move(NamedTuple):
    """Bytes of a unit (`weights`), or of a batch at a unit, between their home and the accelerator. `batch` is -1 for weights."""

    what: What
    way: Literal["load", "store"]
    unit: int
    batch: int = -1


@dataclass(frozen=True, slots=True)
class Unit:
    """What the weights of one step are. `index` is its name; `batches` are those that pass it, in order.

    `weights_away`, `cache_away`: its weights, its keys and values live elsewhere. `keeps`: the batches' hidden states change here.
    """

    index: int
    batches: tuple[int, ...]
    weights_away: bool = False
    cache_away: bool = False
    keeps: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    """Batch `batch` passes unit `unit`, once all of `needs` are complete. `beside` may begin when the step begins, each lane in this order."""

    unit: int
    batch: int
    needs: tuple[Move, ...] = ()
    beside: tuple[Move, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockSchedule:
    """One token of every sequence of a block. `before` comes ahead of the first step, `after` behind the last."""

    steps: tuple[Step, ...]
    before: tuple[Move, ...] = ()
    after: tuple[Move, ...] = ()

    @property
    def moves(self) -> tuple[Move, ...]:
        """All of them, in the order in which they begin."""
        return (*self.before, *(move for step in self.steps for move in step.beside), *self.after)


def zigzag(
    units: Sequence[Unit], hidden_away: Sequence[bool], continues: Sequence[bool] = (), *, warm: bool = False, ahead: bool = False
) -> BlockSchedule:
    """The schedule of one pass of the block. `hidden_away[k]`: batch k's activations do not stay on the accelerator between its steps.

    `continues[k]`: batch k has a sequence of batch k-1, whose new keys it must find. `warm`: the first unit that is loaded has been
    asked for already, because the pass before was made with `ahead`, which asks for it again at the end.
    """
    order = [(unit, batch) for unit in units for batch in unit.batches]
    at = {(unit.index, batch): step for step, (unit, batch) in enumerate(order)}
    needs: list[list[Move]] = [[] for _ in order]
    stores: list[list[Move]] = [[] for _ in range(len(order) + 1)]
    loads: list[list[Move]] = [[] for _ in order]
    before: list[Move] = []

    away = [unit for unit in units if unit.weights_away and unit.batches]
    for turn, unit in enumerate(away):
        load = Move("weights", "load", unit.index)
        for batch in unit.batches:
            needs[at[unit.index, batch]].append(load)
        if turn >= 1:
            loads[_after(away, turn - 2, at)].append(load)
        elif not warm:
            before.append(load)
    if ahead and away:
        loads[_after(away, len(away) - 2, at)].append(Move("weights", "load", away[0].index))

    with_cache = [(unit, batch) for unit, batch in order if unit.cache_away]
    for turn, (unit, batch) in enumerate(with_cache):
        step, load = at[unit.index, batch], Move("cache", "load", unit.index, batch)
        begin = 0 if turn < 2 else at[with_cache[turn - 2][0].index, with_cache[turn - 2][1]] + 1
        if continues and continues[batch]:
            begin = step  # behind the store of the batch before, which that step begins with
        loads[begin].append(load)
        needs[step].append(load)
        stores[step + 1].append(Move("cache", "store", unit.index, batch))

    moving = [(unit, batch) for unit, batch in order if hidden_away[batch]]
    last: dict[int, int] = {}
    for turn, (unit, batch) in enumerate(moving):
        step, load = at[unit.index, batch], Move("hidden", "load", unit.index, batch)
        begin = 0 if turn < 2 else at[moving[turn - 2][0].index, moving[turn - 2][1]] + 1
        loads[max(begin, last.get(batch, -1) + 1)].append(load)
        needs[step].append(load)
        if unit.keeps:
            stores[step + 1].append(Move("hidden", "store", unit.index, batch))
        last[batch] = step

    steps = tuple(Step(unit.index, batch, tuple(needs[step]), (*stores[step], *loads[step])) for step, (unit, batch) in enumerate(order))
    return BlockSchedule(steps, tuple(before), tuple(stores[-1]))


def _after(away: Sequence[Unit], turn: int, at: dict[tuple[int, int], int]) -> int:
    """The first step behind the unit loaded in that turn: its buffer is free. A turn that never was left its buffer free from the start."""
    return at[away[turn].index, away[turn].batches[-1]] + 1 if turn >= 0 else 0
