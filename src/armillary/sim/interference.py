"""Operations that run on one device at the same time slow each other down: by how much, and a schedule carried out so (NanoFlow, section 4.1).

A share R of the device is what a matrix product beside the operation is left without; an operation that has the share R runs at P(R) of its speed alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Final

import numpy as np

from armillary.core.errors import InputError
from armillary.sim.overlap import Task

Shares = Mapping[frozenset[str], Mapping[str, float]]
"""Resources that are busy at once, and the share that the operation on each has."""
_STEPS: Final = 10
_ROUNDS: Final = 8


@dataclass(frozen=True, slots=True)
class Interference:
    """P(R) of operations that need each resource, as points between which it is linear; one without points has P = R."""

    name: str
    source: str
    curves: Mapping[str, tuple[tuple[float, float], ...]]

    def speed(self, resource: str, share: float) -> float:
        """P of a share from 0 to 1."""
        points = self.curves.get(resource)
        return share if points is None else float(np.interp(share, [one for one, _ in points], [speed for _, speed in points]))


NANOFLOW: Final = Interference(
    "nanoflow-a100",
    "Zhu et al. 2025, table 3 and section 4.1.4: measured on an A100 by pairs of kernels; straight lines between the points that are told",
    {
        "memory": ((0.0, 0.0), (0.1, 0.2), (0.2, 0.3), (0.4, 0.8), (0.8, 0.85), (1.0, 1.0)),
        "network": ((0.0, 0.0), (0.2, 0.5), (0.8, 0.9), (1.0, 1.0)),
    },
)
FREE: Final = Interference("none", "no interference", dict.fromkeys(("compute", "memory", "network"), ((0.0, 1.0), (1.0, 1.0))))
KNOWN: Final = {one.name: one for one in (NANOFLOW, FREE)}


def interference(name: str) -> Interference:
    """By name. Raises InputError with those that there are."""
    if name not in KNOWN:
        raise InputError(f"no interference table is called {name[:40]!r}", f"choose from {', '.join(KNOWN)}", field="interference")
    return KNOWN[name]


@dataclass(frozen=True, slots=True)
class Piece:
    """Task `place` from `start` to `end` beside the same others: with `share` of the device, at `speed` of what it has alone."""

    place: int
    start: float
    end: float
    share: float
    speed: float


@dataclass(frozen=True, slots=True)
class Execution:
    """A schedule carried out, and the shares by which it was."""

    pieces: tuple[Piece, ...]
    makespan: float
    shares: Shares


def execute(tasks: Sequence[Task], starts: Sequence[float], shares: Shares, table: Interference) -> Execution:
    """Each resource takes its tasks in the order of `starts`, as soon as those that they wait for have ended; who runs beside whom has its share."""
    queues: dict[str, list[int]] = {}
    for place in sorted(range(len(tasks)), key=lambda one: (starts[one], one)):
        queues.setdefault(tasks[place].resource, []).append(place)
    left, ended = [task.duration for task in tasks], [False] * len(tasks)
    pieces: list[Piece] = []
    now = 0.0
    while any(queues.values()):
        busy = {name: queue[0] for name, queue in queues.items() if queue and all(ended[one] for one in tasks[queue[0]].after)}
        if not busy:
            raise InputError("the schedule's order waits for itself", "order tasks by when they begin")
        given = shares[frozenset(busy)] if len(busy) > 1 else dict.fromkeys(busy, 1.0)
        speeds = {name: table.speed(name, given[name]) for name in busy}
        lasts = min(left[place] / speeds[name] for name, place in busy.items() if speeds[name] > 0)
        for name, place in busy.items():
            if speeds[name] > 0:
                pieces.append(Piece(place, now, now + lasts, given[name], speeds[name]))
            left[place] -= lasts * speeds[name]
            if left[place] <= 1e-9 * tasks[place].duration:
                ended[place] = True
                queues[name].pop(0)
        now += lasts
    return Execution(tuple(pieces), now, shares)


def best_shares(tasks: Sequence[Task], starts: Sequence[float], table: Interference) -> Execution:
    """The shares in tenths with which the schedule ends first, found one set of busy resources after another; a share of 0 makes an operation wait.

    From all waiting for the resource that has most to do, so it is never longer than one operation after another.
    """
    names = sorted({task.resource for task in tasks})
    busiest = max(names, key=lambda name: sum(task.duration for task in tasks if task.resource == name))
    shares: dict[frozenset[str], Mapping[str, float]] = {}
    for among in _sets(names):
        first = busiest if busiest in among else min(among)
        shares[among] = {name: float(name == first) for name in among}
    best = execute(tasks, starts, shares, table)
    for _ in range(_ROUNDS):
        before = best.makespan
        for among in shares:
            for tried in _mixes(among):
                found = execute(tasks, starts, {**best.shares, among: tried}, table)
                if found.makespan < best.makespan * (1 - 1e-9):
                    best = found
        if best.makespan >= before * (1 - 1e-6):
            break
    return best


def least(tasks: Sequence[Task], table: Interference) -> float:
    """No order and no shares in tenths end sooner: each resource's work in the best mixture of what may run at once (a linear program)."""
    from scipy.optimize import linprog

    names = sorted({task.resource for task in tasks})
    work = [sum(task.duration for task in tasks if task.resource == name) for name in names]
    columns = [[float(name == alone) for name in names] for alone in names]
    for among in _sets(names):
        columns += [[table.speed(name, tried.get(name, 0.0)) if name in among else 0.0 for name in names] for tried in _mixes(among)]
    scale = max(work)
    found = linprog(np.ones(len(columns)), -np.array(columns).T, [-one / scale for one in work])
    return float(found.fun) * scale


def _sets(names: Sequence[str]) -> list[frozenset[str]]:
    return [frozenset(among) for size in range(2, len(names) + 1) for among in combinations(names, size)]


def _mixes(among: frozenset[str]) -> list[dict[str, float]]:
    names = sorted(among)
    tenths = [parts for parts in product(range(_STEPS + 1), repeat=len(names)) if sum(parts) == _STEPS]
    return [{name: part / _STEPS for name, part in zip(names, parts, strict=True)} for parts in tenths]
