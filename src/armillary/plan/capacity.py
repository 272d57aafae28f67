"""The highest rate at which an objective holds: bisection over simulations that are long enough to believe."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol, Self

import numpy as np

from armillary.core.errors import CapacityError, InputError
from armillary.core.units import S
from armillary.plan.demand import Demand
from armillary.plan.objective import Objective
from armillary.serve.request import Request
from armillary.serve.simulation.recorder import Result
from armillary.serve.simulation.scenario import Run

TOLERANCE: Final = 0.02
"""How far apart the rate that holds and the one that does not may be in the end."""
MOST_REQUESTS: Final = 32_768
"""Of one simulation and replica. What has not settled by then counts as not held."""
_FIRST: Final = 256  # requests of the first, shortest simulation of a rate
_SURE: Final = 2048  # requests after which a share near the objective's is believed: one standard error of 90 % is then 0.9 %
_ALONE: Final = 128  # requests that are asked one by one
_RESIDENCES: Final = 4  # mean residences that pass before requests are judged: by then an empty start is forgotten
_WAITS: Final = 20  # bounds on waiting that a run lasts, for queues of that length to come and go
_DOUBLINGS: Final = 40


class Simulated(Protocol):
    """What serves requests in virtual time: a `Scenario`, or the `Phases` of a disaggregated one."""

    @property
    def replicas(self) -> int:
        """By so many times a simulation is longer."""
        ...

    @property
    def context(self) -> int:
        """Most tokens of a request."""
        ...

    def single(self) -> Self:
        """The least of it that serves."""
        ...

    def run(self, requests: Iterable[Request], /) -> Run: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate tried, requests a second. Shares are of the later half of `requests`; times in ns: the median, the objective's own percentile `p`, the 99th.

    `growth`: by how much a request's wait for its first token grows for each second that it comes later, s/s. A queue that is stable has 0;
    one that gets `r` and serves `c` requests a second has 1 - c/r.
    """

    rate: float
    requests: int
    holds: bool
    attainment: float
    each: dict[str, float]
    growth: float
    settled: bool
    first_token: tuple[float, float, float]  # median, p, 99th percentile
    per_token: tuple[float, float, float]
    wait: tuple[float, float, float]
    throughput: float  # generated tokens a second of the judged part


@dataclass(frozen=True, slots=True)
class Capacity:
    """The highest `rate` found to hold (0 where not even requests one by one do), and every probe in the order of trying."""

    rate: float
    probes: tuple[Probe, ...]
    alone: Probe

    @property
    def at(self) -> Probe | None:
        """The probe of the capacity."""
        return max((probe for probe in self.probes if probe.holds), key=lambda probe: probe.rate, default=None)


def capacity(
    scenario: Simulated,
    demand: Demand,
    objective: Objective,
    *,
    tolerance: float = TOLERANCE,
    enough: float = 0.0,
    most: float = math.inf,
    tried: Callable[[Probe], None] | None = None,
) -> Capacity:
    """Bisect on the rate until it is known within `tolerance`, relative.

    Below `enough` requests a second nobody wants to know: when that rate does not hold, the capacity is given as 0, with the probe.
    Above `most` nothing can hold, so nothing is tried. `tried` is told of every probe. Raises InputError for a request that could never run.
    """
    if not 1e-4 <= tolerance < 1:
        raise InputError(f"a tolerance of {tolerance:g} cannot be reached", "give 0.0001 to 1, such as 0.02", field="tolerance")
    probes: list[Probe] = []

    def holds(rate: float) -> bool:
        if rate > most:
            return False
        probes.append(probe(scenario, demand, objective, rate, tolerance))
        if tried is not None:
            tried(probes[-1])
        return probes[-1].holds

    alone, residence = _alone(scenario, demand, objective)
    if not alone.holds:
        return Capacity(0.0, (), alone)
    if enough and not holds(enough):
        return Capacity(0.0, tuple(probes), alone)
    # Powers of two about one request at a time: the same rates for every objective.
    low = max(enough, scenario.replicas * S / residence)
    if enough < low and not holds(low):
        for _ in range(_DOUBLINGS):
            high, low = low, low / 2
            if low <= enough or holds(low):
                low = max(low, enough)
                break
        else:
            return Capacity(0.0, tuple(probes), alone)
    else:
        high = low
        for _ in range(_DOUBLINGS):
            high *= 2
            if not holds(high):
                break
            low = high
        else:
            raise CapacityError(
                f"the objective ({objective}) still holds at {low:,.0f} requests a second: the cost model has no limit",
                "look at what it says of large batches",
                field="cost",
            )
    while high > low * (1 + tolerance):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if holds(middle) else (low, middle)
    return Capacity(low, tuple(probes), alone)


def probe(scenario: Simulated, demand: Demand, objective: Objective, rate: float, tolerance: float = TOLERANCE) -> Probe:
    """Whether the objective holds at `rate`, by the later half of a simulation that is doubled until it has settled.

    An engine that starts empty looks better at first than it will be, so what fails in a short run has failed. What holds must hold in a run
    whose first half is `_RESIDENCES` times the mean residence, and that is `_WAITS` times as long as the bound on waiting; and waits must not
    grow by more than `tolerance` of the time. A close result is looked at again with more requests; where waits still grow after that, and
    did in half as long a run, they are taken to grow for ever. A demand that has an end is judged by all of it.
    """
    if demand.whole is not None:
        return _once(scenario, demand, objective, rate, demand.whole)[0]
    count, most = _FIRST * scenario.replicas, MOST_REQUESTS * scenario.replicas
    sure = max(count, round(_SURE * min(1.0, (TOLERANCE / tolerance) ** 2)))
    grew = False
    while True:
        found, needed = _once(scenario, demand, objective, rate, count)
        noise, above = _noise(objective, count // 2), found.attainment - objective.attainment
        grows = found.growth > tolerance
        if above < -noise or (grows and grew and count >= sure):
            return replace(found, holds=False)
        grew = grows
        close = above < noise or found.growth > tolerance / 4
        if count >= most or (count >= needed and not (close and count < sure)):
            settled = count >= needed
            return replace(found, settled=settled, holds=settled and above >= 0 and not grows)
        count = min(max(2 * count, min(needed, 4 * count)), most)


def _once(scenario: Simulated, demand: Demand, objective: Objective, rate: float, count: int) -> tuple[Probe, int]:
    """A simulation of `count` requests, and how many there should be."""
    try:
        result = scenario.run(demand.requests(rate, count, scenario.context)).result
    except CapacityError:  # the queue passed its bound
        return Probe(rate, count, False, 0.0, {}, 1.0, True, (0, 0, 0), (0, 0, 0), (0, 0, 0), 0.0), count
    if demand.whole is not None:
        return _judged(rate, count, result, objective, _growth(result)), count
    span = int(result.arrival.max())
    later = since(result, span // 2)
    residence = float((later.finished - later.arrival).mean())
    span_needed = max(2 * _RESIDENCES * residence, _WAITS * objective.longest_wait)
    needed = math.ceil(count * span_needed / max(1, span))
    return _judged(rate, count, later, objective, _growth(later)), needed


def since(result: Result, instant: int) -> Result:
    """The requests that arrived at `instant` ns or later; without gaps, which know no request."""
    chosen = result.arrival >= instant
    columns = {name: getattr(result, name)[chosen] for name in Result.__dataclass_fields__ if not name.startswith("gap")}
    return Result(**columns, gaps=np.array([], dtype=np.int64), gap_counts=np.array([], dtype=np.int64))


def _judged(rate: float, count: int, judged: Result, objective: Objective, growth: float) -> Probe:
    met = objective.met(judged)

    def spread(values: np.ndarray) -> tuple[float, float, float]:
        if not len(values):
            return 0.0, 0.0, 0.0
        median, high, last = np.percentile(values, (50, 100 * objective.attainment, 99), method="inverted_cdf")
        return float(median), float(high), float(last)

    return Probe(
        rate, count, met >= objective.attainment, met, objective.each(judged), growth, True, spread(judged.first_tokens),
        spread(judged.per_token), spread(judged.waits), judged.throughput,
    )  # fmt: skip


def _growth(result: Result) -> float:
    """The slope of the wait for the first token over the time of arrival, s/s (least squares); of the wait in the queue where first tokens are
    there from the beginning."""
    first = result.first_tokens if result.first_tokens.any() else result.waits
    at, waited = result.arrival.astype(np.float64), first.astype(np.float64)
    at = at - at.mean()
    spread = float(at @ at)
    return float(at @ (waited - waited.mean())) / spread if spread else 0.0


def _alone(scenario: Simulated, demand: Demand, objective: Objective) -> tuple[Probe, float]:
    """Requests of whom none meets another, and their mean residence in ns: no rate does better."""
    one, context = scenario.single(), scenario.context

    def apart(gap: int) -> Result:
        coming = list(demand.requests(1.0, _ALONE, context))
        for place, request in enumerate(coming):
            request.arrival = gap * place
        return one.run(coming).result

    gap = S
    while True:  # until the longest is over before the next one comes
        result = apart(gap)
        longest = int((result.finished - result.arrival).max())
        if longest < gap:
            break
        gap = 4 * longest
    judged = _judged(0.0, _ALONE, result, objective, 0.0)
    held = judged.attainment >= objective.attainment - _noise(objective, _ALONE)
    return replace(judged, holds=held), float((result.finished - result.arrival).mean())


def _noise(objective: Objective, count: int) -> float:
    """Three standard errors of a share of `count` requests."""
    return 3 * math.sqrt(objective.attainment * (1 - objective.attainment) / count)
