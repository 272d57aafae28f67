"""The best placement by the cost model: a linear program over the nine fractions, for each size of block and batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from armillary.core.errors import CapacityError, InputError
from armillary.serve.offload.cost import FRACTIONS, T4, Hardware, Price, Work, generation_rows, peak_rows, prefill_rows, price
from armillary.serve.offload.policy import Split


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a block's bytes go, and what that costs."""

    work: Work
    weights: Split
    cache: Split
    hidden: Split
    price: Price


def best_fractions(work: Work, hardware: Hardware = T4, *, hidden_on_disk: bool = False) -> Placement:
    """The fractions that take the least time for this block and batch (Sheng et al. 2023, section 4.3), by HiGHS.

    Two more variables bound the maxima from above: Tpre and Tgen. FlexGen's runtime keeps no activations on disk, and neither does its
    model unless asked. Raises CapacityError when no placement fits the hardware.
    """
    count = len(FRACTIONS)
    bounded, limits = [], []
    for phase, rows in ((0, prefill_rows(work, hardware)), (1, generation_rows(work, hardware))):
        for one in rows:  # row <= T of the phase
            line = np.concatenate([one[1:], np.zeros(2)])
            line[count + phase] = -1.0
            bounded.append(line)
            limits.append(-one[0])
    for used, limit in peak_rows(work, hardware).values():
        scale = limit or max(1.0, float(np.abs(used).max()))  # a tier may be of no size
        bounded.append(np.concatenate([used[1:], np.zeros(2)]) / scale)  # of order 1, as the solver likes it
        limits.append((limit - used[0]) / scale)
    wholes = np.zeros((3, count + 2))
    for kind in range(3):
        wholes[kind, 3 * kind : 3 * kind + 3] = 1.0
    goal = np.zeros(count + 2)
    goal[count:] = 1.0, work.passes / work.layers
    bounds = [(0.0, 1.0)] * count + [(0.0, None)] * 2
    if not hidden_on_disk:
        bounds[FRACTIONS.index("hd")] = (0.0, 0.0)
    found = linprog(goal, np.array(bounded), limits, wholes, np.ones(3), bounds)
    if found.status != 0:
        raise CapacityError(
            f"no placement of a block of {work.block} sequences in batches of {work.batch} fits this hardware",
            "make the block or the batch smaller",
        )
    weights, cache, hidden = (_split(found.x[3 * kind : 3 * kind + 3]) for kind in range(3))
    return Placement(work, weights, cache, hidden, price(work, weights, cache, hidden, hardware))


def best_placement(work: Work, blocks: Iterable[tuple[int, int]], hardware: Hardware = T4) -> Placement:
    """The best of several (block, batch) sizes, by throughput; those that fit nowhere are left out."""
    found = list(_fitting(work, blocks, hardware))
    if not found:
        raise InputError("no size of block and batch fits this hardware", "offer smaller ones")
    return max(found, key=lambda one: one.price.throughput)


def _fitting(work: Work, blocks: Iterable[tuple[int, int]], hardware: Hardware) -> Iterator[Placement]:
    for block, batch in blocks:
        try:
            yield best_fractions(replace(work, block=block, batch=batch), hardware)
        except CapacityError:
            continue


def _split(shares: np.ndarray) -> Split:
    clean = np.abs(np.clip(shares, 0.0, 1.0))  # no -0
    return Split(*(float(share) for share in clean / clean.sum()))
