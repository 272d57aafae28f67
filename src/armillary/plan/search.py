"""The cheapest configuration that serves a demand under an objective: cheap bounds first, simulations for what they leave."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from armillary.core.errors import CapacityError, InputError
from armillary.core.units import format_duration
from armillary.plan.bounds import Alone, Ceiling, alone, ceiling
from armillary.plan.candidates import Candidate, Pruned
from armillary.plan.capacity import TOLERANCE, Capacity, capacity
from armillary.plan.demand import Demand, Moments
from armillary.plan.objective import Objective
from armillary.plan.rent import DEVICES, Group, Rent
from armillary.serve.simulation.scenario import Scenario

if TYPE_CHECKING:
    from armillary.plan.disaggregation import Apart

Rank = Literal["dollars", "devices"]
Told = Callable[[int, int, str], None]
"""Candidates done, candidates in all, what has just been found."""
Score = tuple[float, float]
"""What an option costs for the rate, and for each request a second: less is better. $/hour, or devices."""


@dataclass(frozen=True, slots=True)
class Option:
    """A candidate and what it sustains. `rent` is what its replicas cost in the search's terms, $/hour or devices."""

    candidate: Candidate
    alone: Alone
    ceiling: Ceiling
    rent: Rent
    capacity: Capacity

    @property
    def name(self) -> str:
        return self.candidate.name

    def replicas(self, rate: float | None) -> int:
        """How many serve `rate` requests a second; 1 for no rate."""
        return 1 if rate is None else needed(rate, self.capacity.rate)

    def counts(self, rate: float | None) -> tuple[int, ...]:
        """The same, as the engines of all kinds that there are."""
        return (self.replicas(rate),)

    def groups(self, counts: tuple[int, ...]) -> tuple[Group, ...]:
        """The devices of so many."""
        return ((counts[0], self.candidate.devices),)

    def simulated(self, counts: tuple[int, ...], router: str) -> Scenario:
        """So many, behind a router."""
        return replace(self.candidate.scenario, replicas=counts[0], router=router)

    def more(self, counts: tuple[int, ...], each: dict[str, float]) -> tuple[int, ...]:
        """The next larger ones, when so many keep only these shares of each bound."""
        return (counts[0] + 1,)

    def score(self, rate: float | None) -> Score:
        return score(self.rent, self.candidate.devices, self.capacity.rate, rate)


@dataclass(frozen=True, slots=True)
class Found:
    """Options, the best first, and all that is none, with why. `rate`: what is wanted in all, requests a second (None: as much as it may be).
    Capacities are known within `tolerance`, relative."""

    options: tuple[Option | Apart, ...]
    pruned: tuple[Pruned, ...]
    moments: Moments
    rate: float | None
    rank: Rank
    tolerance: float = TOLERANCE


def search(
    candidates: Iterable[Candidate | Pruned],
    demand: Demand,
    objective: Objective,
    *,
    rate: float | None = None,
    rank: Rank = "dollars",
    keep: int = 3,
    tolerance: float = TOLERANCE,
    told: Told | None = None,
) -> Found:
    """The `keep` best, within `tolerance`; the others only as far as it takes to know that they are not among these.

    Best is what costs least an hour for `rate` (replicas are whole), and of those, and without a rate, what costs least a request. Candidates
    are taken by what their ceilings promise; each is first simulated at the rate at which it would be as good as the last of the best, and is
    bisected only if it holds that. Raises CapacityError when the model fits nowhere, InputError when nothing keeps the objective.
    """
    if rate is not None and not (math.isfinite(rate) and rate > 0):
        raise InputError(f"{rate:g} requests a second is no rate", "give more than 0, such as --rate 20", field="rate")
    if keep < 1:
        raise InputError(f"the best {keep} are no choice", "keep at least 1", field="keep")
    pruned: list[Pruned] = []
    fitting: list[Candidate] = []
    for one in candidates:
        (pruned if isinstance(one, Pruned) else fitting).append(one)  # type: ignore[arg-type]
    contexts = {candidate.scenario.settled.context for candidate in fitting}
    if not contexts:
        raise fits_nowhere(pruned)
    (context,) = contexts
    assert context is not None
    moments = demand.moments(context)
    hopeful = _promising(fitting, pruned, demand, moments, objective, rank, context)
    if not hopeful:
        raise unreachable(fitting, pruned, demand, objective)
    hopeful.sort(key=lambda one: score(one[3], one[0].devices, one[2].rate, rate))
    options: list[Option] = []
    for place, (candidate, least, most, cost) in enumerate(hopeful):
        enough = as_good(options[keep - 1].score(rate), cost, candidate.devices, rate) if len(options) >= keep else 0.0
        if enough >= most.rate:
            why = f"its ceiling is {most.rate:.3g} requests a second a replica, and {enough:.3g} would be as good as the {_nth(keep)} best"
            pruned.append(Pruned(candidate.name, "ceiling", why))
        else:
            found = capacity(candidate.scenario, demand, objective, tolerance=tolerance, enough=enough, most=most.rate)
            if found.rate:
                options = sorted([*options, Option(candidate, least, most, cost, found)], key=lambda one: one.score(rate))
            else:
                pruned.append(_simulated_away(candidate, found, enough, objective))
        if told is not None:
            told(place + 1, len(hopeful), candidate.name)
    for beaten in options[keep:]:
        why = f"{beaten.capacity.rate:.3g} requests a second a replica"
        pruned.append(Pruned(beaten.candidate.name, "beaten", why))
    if not options:
        raise unreachable([candidate for candidate, *_ in hopeful], pruned, demand, objective)
    return Found(tuple(options[:keep]), tuple(pruned), moments, rate, rank, tolerance)


def _promising(
    fitting: list[Candidate], pruned: list[Pruned], demand: Demand, moments: Moments, objective: Objective, rank: Rank, context: int
) -> list[tuple[Candidate, Alone, Ceiling, Rent]]:
    """Those that the cheap bounds leave, with what these say and what replicas cost."""
    left: list[tuple[Candidate, Alone, Ceiling, Rent]] = []
    longest = demand.longest(context)
    for candidate in fitting:
        config = candidate.scenario.lane
        assert config.kv_blocks is not None
        cost = DEVICES if rank == "devices" else candidate.rent
        pool = config.kv_blocks * config.block_size
        least = alone(candidate, demand, objective)
        if pool < longest:
            why = f"its KV cache holds {pool:,} tokens, and the longest request has {longest:,}"
            pruned.append(Pruned(candidate.name, "memory", why, "use more devices, a smaller format, or a smaller --context"))
        elif (miss := least.misses(objective)) is not None:
            pruned.append(Pruned(candidate.name, "alone", miss))
        elif cost.price is None:
            why = f"nothing says what {candidate.spelling} costs"
            pruned.append(Pruned(candidate.name, "price", why, "give its price in a catalogue file (docs/cluster.md), or --rank devices"))
        else:
            left.append((candidate, least, ceiling(candidate, moments), cost))
    return left


def needed(rate: float, each: float) -> int:
    """How many engines serve `rate` requests a second of which one serves `each`."""
    return max(1, math.ceil(rate / each * (1 - 1e-9)))


def score(cost: Rent, devices: int, each: float, rate: float | None, nodes: int = 1) -> Score:
    """Of replicas that serve `each` requests a second on so many devices (of each of so many nodes)."""
    share = cost.share(devices)
    assert share is not None
    if rate is None:
        return nodes * share / each, nodes * share / each
    whole = cost.cost((nodes * needed(rate, each), devices))
    assert whole is not None
    return whole, nodes * share / each


def as_good(best: Score, cost: Rent, devices: int, rate: float | None, nodes: int = 1) -> float:
    """The rate at which a replica would score as `best`; infinite when at none."""
    whole, each = best
    share = cost.share(devices)
    assert share is not None
    if rate is None:
        return nodes * share / each
    most = cost.most(devices, whole) // nodes
    return rate / most if most else math.inf


def _simulated_away(candidate: Candidate, found: Capacity, enough: float, objective: Objective) -> Pruned:
    if not found.probes:
        worst = min(found.alone.each, key=lambda key: found.alone.each[key])
        share = found.alone.each[worst]
        return Pruned(candidate.name, "alone", f"one by one, only {share:.3g} of the requests keep {worst} {_bound(objective, worst)}")
    last = found.probes[-1]
    if not enough:
        return Pruned(candidate.name, "objective", f"at {last.rate:.3g} requests a second {last.attainment:.3g} of them keep the objective")
    growing = f", and waits grow by {last.growth:.3g} s a second" if last.attainment >= objective.attainment else ""
    return Pruned(
        candidate.name,
        "beaten",
        f"at {enough:.3g} requests a second a replica, which would be as good, {last.attainment:.3g} of them keep the objective{growing}",
    )


def fits_nowhere(pruned: list[Pruned]) -> CapacityError | InputError:
    """The error when there is nothing to simulate: of what did not fit, the closest is told."""
    tight = [one for one in pruned if one.reason == "memory"]
    if tight:
        last = tight[-1]  # degrees go up
        return CapacityError(
            f"the model fits none of the {len(pruned)} deployments tried; the largest: {last.detail}", last.fix, field="cluster"
        )
    if not pruned:
        return InputError("there are no candidates", "give a cluster", field="cluster")
    return InputError(f"none of the {len(pruned)} deployments is possible; the first: {pruned[0].detail}", pruned[0].fix, field="cluster")


def unreachable(tried: list[Candidate], pruned: list[Pruned], demand: Demand, objective: Objective) -> InputError | CapacityError:
    """The error when nothing keeps the objective: which bound, what the best reaches, and what would help."""
    unpriced = [one for one in pruned if one.reason == "price"]
    if unpriced:
        return InputError(f"{unpriced[0].detail}, nor any other candidate that keeps the objective", unpriced[0].fix, field="rank")
    reached = [(alone(candidate, demand, objective), candidate.name) for candidate in tried]
    said, allowed = [], []
    for key, bound, field in (("ttft", objective.first_token, "first_token"), ("tpot", objective.per_token, "per_token")):
        if bound is None:
            continue
        least, name = min((getattr(one, field), name) for one, name in reached)
        said.append(f"{key} is {format_duration(least)} at best ({name}), {format_duration(bound)} is asked for")
        if least > bound:
            allowed.append(f"{key}={format_duration(least * 1.1).replace(' ', '')}")
    tight = [one for one in pruned if one.reason == "memory" and one.count == 1]
    if tight and len(tight) == len([one for one in pruned if one.reason in ("memory", "alone", "objective")]):
        return CapacityError(tight[-1].detail, tight[-1].fix, field="cluster")
    return InputError(
        f"none of {len(tried)} candidates keeps the objective, {objective}, at any rate: of a request alone {'; '.join(said)}",
        f"allow {', '.join(allowed) or 'looser bounds or a lower attainment'}, or try more tensor parallelism (--tp), a smaller format (--weights int8), faster devices, shorter prompts",
        field="slo",
    )


def _bound(objective: Objective, key: str) -> str:
    return format_duration(objective.bounds[key])


def _nth(place: int) -> str:
    return {1: "", 2: "second", 3: "third"}.get(place, f"{place}th") or "first"
