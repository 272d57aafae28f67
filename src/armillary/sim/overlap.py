"""Operations that share a device: when each begins, so that compute, memory and network are busy at once (Zhu et al., NanoFlow, OSDI 2025)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Final

import numpy as np

from armillary.core.errors import InputError

MOST: Final = 120  # operations: the pairs that share a resource are the program's binaries
_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Task:
    """An operation of `duration` (any unit) that has `resource` to itself, after all of `after` (places in the list)."""

    name: str
    resource: str
    duration: float
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Overlap:
    """When each task begins, and when the last ends. `optimal`: nothing shorter exists."""

    starts: tuple[float, ...]
    makespan: float
    optimal: bool


def bound(tasks: Sequence[Task]) -> float:
    """No schedule is shorter: the busiest resource, and the longest chain."""
    busy: dict[str, float] = defaultdict(float)
    ends: list[float] = []
    for task in tasks:
        busy[task.resource] += task.duration
        ends.append(task.duration + max((ends[place] for place in task.after), default=0.0))
    return max(*busy.values(), *ends)


def sequential(tasks: Sequence[Task]) -> float:
    """One after another."""
    return sum(task.duration for task in tasks)


def greedy(tasks: Sequence[Task]) -> Overlap:
    """Whoever can begin first does, of equals the one with the longest chain behind it (list scheduling)."""
    tails = [task.duration for task in tasks]
    for place in range(len(tasks) - 1, -1, -1):
        for before in tasks[place].after:
            tails[before] = max(tails[before], tasks[before].duration + tails[place])
    free: dict[str, float] = defaultdict(float)
    starts, left = [-1.0] * len(tasks), set(range(len(tasks)))
    while left:
        ready = {
            place: max(free[tasks[place].resource], *(starts[one] + tasks[one].duration for one in tasks[place].after), 0.0)
            for place in left
            if all(starts[one] >= 0 for one in tasks[place].after)
        }
        place = min(ready, key=lambda one: (ready[one], -tails[one], one))
        starts[place] = ready[place]
        free[tasks[place].resource] = ready[place] + tasks[place].duration
        left.remove(place)
    return Overlap(tuple(starts), max(start + task.duration for start, task in zip(starts, tasks, strict=True)), False)


def overlapped(tasks: Sequence[Task], seconds: float = _SECONDS) -> Overlap:
    """The shortest schedule, by a mixed-integer program (HiGHS) that is given up after `seconds`; never longer than the greedy one.

    One binary says for each pair of tasks of a resource, of which neither must wait for the other, who goes first. Raises InputError for more
    than `MOST` tasks, and for one that waits for a later one.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    if not 0 < len(tasks) <= MOST:
        raise InputError(f"{len(tasks)} operations are to be overlapped", f"give 1 to {MOST}: overlap one layer and repeat it")
    before = _ancestors(tasks)
    first = greedy(tasks)
    if first.makespan <= bound(tasks) * (1 + 1e-9):
        return Overlap(first.starts, first.makespan, True)
    pairs = [
        (a, b)
        for a, b in combinations(range(len(tasks)), 2)
        if tasks[a].resource == tasks[b].resource and a not in before[b] and b not in before[a]
    ]
    count, horizon = len(tasks), first.makespan  # variables: starts, the end, who goes first
    entries: list[tuple[int, int, float]] = []
    least: list[float] = []

    def constrain(terms: dict[int, float], low: float) -> None:
        entries.extend((len(least), variable, coefficient) for variable, coefficient in terms.items())
        least.append(low)

    for place, task in enumerate(tasks):
        constrain({count: 1.0, place: -1.0}, task.duration)
        for one in task.after:
            constrain({place: 1.0, one: -1.0}, tasks[one].duration)
    for index, (a, b) in enumerate(pairs, count + 1):
        constrain({b: 1.0, a: -1.0, index: -horizon}, tasks[a].duration - horizon)  # a first where the binary is 1
        constrain({a: 1.0, b: -1.0, index: horizon}, tasks[b].duration)
    variables = count + 1 + len(pairs)
    rows, columns, values = zip(*entries, strict=True)
    matrix = csr_array((values, (rows, columns)), shape=(len(least), variables))
    objective = np.zeros(variables)
    objective[count] = 1.0
    upper = np.concatenate([np.full(count + 1, horizon), np.ones(len(pairs))])
    found = milp(
        objective,
        constraints=LinearConstraint(matrix, np.array(least)),
        bounds=Bounds(np.zeros(variables), upper),
        integrality=np.concatenate([np.zeros(count + 1), np.ones(len(pairs))]),
        options={"time_limit": seconds},
    )
    if found.x is None or found.x[count] >= first.makespan:
        return Overlap(first.starts, first.makespan, found.status == 0)
    return Overlap(tuple(float(start) for start in found.x[:count]), float(found.x[count]), found.status == 0)


def _ancestors(tasks: Sequence[Task]) -> list[set[int]]:
    """Of each task those that must have ended before it."""
    found: list[set[int]] = []
    for place, task in enumerate(tasks):
        if any(not 0 <= one < place for one in task.after):
            raise InputError(
                f"'{task.name}' waits for an operation that is not before it in the list", "list operations in an order that works"
            )
        found.append(set(task.after).union(*(found[one] for one in task.after)))
    return found
