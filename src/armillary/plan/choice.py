"""Which option it is in the end: replicas or phases apart, all engines together behind the router at the wanted rate."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from armillary.core.errors import CapacityError, InputError
from armillary.plan.candidates import Candidate, Pruned
from armillary.plan.capacity import TOLERANCE, Probe, probe
from armillary.plan.demand import Demand
from armillary.plan.disaggregation import Apart, disaggregate, refusal
from armillary.plan.objective import Objective
from armillary.plan.search import Found, Option, Rank, Score, Told, fits_nowhere, search, unreachable
from armillary.serve.simulation.phases import Phases
from armillary.serve.simulation.scenario import Scenario

Apartness = Literal["auto", "always", "never"]
"""Whether prompts and answers have engines of their own: where that is better, or in any case."""
SIMULATED: Final = 32  # engines that are simulated together; more behave as these do
_MORE: Final = 1.5  # how many times the engines that single ones call for may be needed together


@dataclass(frozen=True, slots=True)
class Chosen:
    """An option with as many engines as the rate takes, and what they do together."""

    option: Option | Apart
    counts: tuple[int, ...]
    simulated: Scenario | Phases
    seen: Probe

    @property
    def devices(self) -> int:
        """That compute."""
        return sum(count * size for count, size in self.option.groups(self.counts))

    def score(self, rate: float) -> Score:
        whole = self.option.rent.cost(*self.option.groups(self.counts))
        assert whole is not None
        return whole, self.option.score(rate)[1]


def find(
    candidates: Iterable[Candidate | Pruned],
    demand: Demand,
    objective: Objective,
    *,
    apart: Apartness = "auto",
    rate: float | None = None,
    rank: Rank = "dollars",
    keep: int = 3,
    tolerance: float = TOLERANCE,
    told: Told | None = None,
) -> Found:
    """The `keep` best of replicas and of prefill and decode instances, by what single engines promise. Raises as `search`."""
    every = list(candidates)
    fitting = [one for one in every if isinstance(one, Candidate)]
    if apart == "always":
        pruned = [one for one in every if isinstance(one, Pruned)]
        if not fitting:
            raise fits_nowhere(pruned)
        found = Found((), tuple(pruned), demand.moments(fitting[0].scenario.context), rate, rank, tolerance)
    else:
        found = search(every, demand, objective, rate=rate, rank=rank, keep=keep, tolerance=tolerance, told=told)
    if apart == "never":
        return found
    if (why := refusal(objective, found.moments, fitting[0].scenario.config.kv_policy)) is not None:
        if apart == "always":
            raise InputError(why, "give both bounds, or --disaggregate never", field="disaggregate")
        return replace(found, pruned=(*found.pruned, Pruned("prefill and decode instances", "phases", why)))
    best = found.options[keep - 1].score(rate) if len(found.options) >= keep else None
    more, pruned = disaggregate(fitting, demand, objective, found.moments, rate=rate, rank=rank, best=best, tolerance=tolerance, told=told)
    options = sorted([*found.options, *more], key=lambda one: one.score(rate))
    if not options and pruned and all(one.reason == "layout" for one in pruned):
        raise InputError(pruned[0].detail, pruned[0].fix, field="disaggregate")
    if not options:
        raise unreachable(fitting, pruned, demand, objective)
    for beaten in options[keep:]:
        pruned.append(
            Pruned(beaten.name, "beaten", f"it costs {beaten.score(rate)[0]:.4g} {'an hour' if rank == 'dollars' else 'devices'}")
        )
    return replace(found, options=tuple(options[:keep]), pruned=(*found.pruned, *pruned))


def choose(found: Found, demand: Demand, objective: Objective, rate: float, router: str) -> tuple[Chosen, Found]:
    """The best of what was found, with all of its engines together; it is the first of the options then.

    Single engines never promise too little, so options are taken in the order of their promises, until the next one promises no better than
    the best so far keeps. Raises CapacityError when none keeps the objective.
    """
    best: Chosen | None = None
    refused: list[CapacityError] = []
    pruned: list[Pruned] = []
    for option in found.options:
        if best is not None and option.score(rate) >= best.score(rate):
            break
        try:
            seen = together(option, demand, objective, rate, router)
        except CapacityError as error:
            refused.append(error)
            pruned.append(Pruned(option.name, "together", error.problem, error.fix))
            continue
        if best is None or seen.score(rate) < best.score(rate):
            best = seen
    if best is None:
        raise refused[0]
    gone = {one.name for one in pruned}
    others = [option for option in found.options if option is not best.option and option.name not in gone]
    return best, replace(found, options=(best.option, *others), pruned=(*found.pruned, *pruned))


def together(option: Option | Apart, demand: Demand, objective: Objective, rate: float, router: str = "power-of-two") -> Chosen:
    """As many engines as it takes for `rate`, and what they do. A router shares less evenly than one queue would, and requests must be kept in
    both phases, so this may be more than capacities alone say. Of more than 32, 32 are simulated with their share of the rate."""
    counts = least = option.counts(rate)
    while sum(counts) <= math.ceil(_MORE * sum(least)) + 1:
        shown, share = _shown(counts)
        seen = probe(option.simulated(shown, router), demand, objective, rate * share)
        if seen.holds:
            return Chosen(option, counts, option.simulated(counts, router), seen)
        counts = option.more(counts, seen.each)
    raise CapacityError(
        f"{option.name}: not even {' + '.join(map(str, counts))} engines behind the router {router} keep the objective at {rate:g} requests a second, "
        f"where {' + '.join(map(str, least))} would by themselves",
        "choose another --router, such as shortest-queue",
        field="router",
    )


def _shown(counts: tuple[int, ...]) -> tuple[tuple[int, ...], float]:
    """As many of each as are simulated, and their share of the rate: the largest that any kind has, so that none is spared."""
    scale = min(1.0, SIMULATED / sum(counts))
    shown = tuple(max(1, round(scale * count)) for count in counts)
    return shown, max(some / count for some, count in zip(shown, counts, strict=True))
