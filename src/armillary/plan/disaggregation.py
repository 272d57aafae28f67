"""Where prompts and answers go when they have instances of their own: DistServe's two placement algorithms (Zhong et al., OSDI 2024, section 4).

Algorithm 1, for clusters whose nodes are joined by a fast network: the instance of each phase that serves most for its price, by itself, and
as many of each as the rate takes. Algorithm 2, for others: pairs of a prefill and a decode instance whose stages lie on the same nodes, so that
keys and values stay on a node's fabric; the pair that serves most for its price. Where the paper has its simulator, this has the engine in
virtual time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Literal

from armillary.cluster.cluster import Cluster, cluster
from armillary.cluster.device import Link
from armillary.core.errors import InputError
from armillary.plan.bounds import Ceiling, alone, ceiling
from armillary.plan.candidates import Candidate, Pruned
from armillary.plan.capacity import TOLERANCE, Capacity, capacity
from armillary.plan.demand import Demand, Moments
from armillary.plan.objective import Objective
from armillary.plan.rent import DEVICES, Group, Rent
from armillary.plan.search import Rank, Score, Told, as_good, needed, score
from armillary.serve.simulation.phases import Phases, transfer_link

Phase = Literal["prefill", "decode"]
NODE: Final = 8
"""Devices of the nodes in which bare devices (`h100`) are thought to be."""
_SMOOTHED: Final = 1.25  # how much more a phase may serve in company than alone: prompts end more evenly than they come


@dataclass(frozen=True, slots=True)
class Instance:
    """An engine of one phase. It serves at most `bound` requests a second; `capacity` is what it sustains by itself, where that was sought."""

    candidate: Candidate
    ceiling: Ceiling
    bound: float
    capacity: Capacity | None

    @property
    def rate(self) -> float:
        """Requests a second that are believed of it."""
        return self.bound if self.capacity is None else self.capacity.rate


@dataclass(frozen=True, slots=True)
class Apart:
    """Prefill and decode instances and the link between them. `pair`: requests a second that one of each serves together where they share
    `nodes` (algorithm 2), by `capacity`; None where each phase is multiplied by itself (algorithm 1). `rent`: what they cost in the search's terms."""

    prefill: Instance
    decode: Instance
    link: Link
    rent: Rent
    pair: float | None = None
    nodes: int = 1
    capacity: Capacity | None = None

    @property
    def algorithm(self) -> int:
        """Of the paper's."""
        return 1 if self.pair is None else 2

    @property
    def name(self) -> str:
        config = self.phases.prefill.config
        where = (
            f"over {self.link.name}"
            if self.pair is None
            else "in pairs on a node"
            if self.nodes == 1
            else f"in pairs on {self.nodes} nodes"
        )
        return (
            f"prefill {self.prefill.candidate.place} + decode {self.decode.candidate.place}, {where}, "
            f"{config.policy} {config.max_batch_tokens}/{config.max_running}"
        )

    @property
    def phases(self) -> Phases:
        """One of each."""
        return joined(self.prefill.candidate, self.decode.candidate, self.link, paired=self.pair is not None)

    def counts(self, rate: float | None) -> tuple[int, ...]:
        """Prefill and decode instances that serve `rate`, by what each sustains; one of each for no rate."""
        if rate is None:
            return 1, 1
        if self.pair is not None:
            count = needed(rate, self.pair)
            return count, count
        return needed(rate, self.prefill.rate), needed(rate, self.decode.rate)

    def groups(self, counts: tuple[int, ...]) -> tuple[Group, ...]:
        """The devices of so many."""
        sizes = self.prefill.candidate.devices, self.decode.candidate.devices
        if self.pair is not None:
            return ((counts[0] * self.nodes, sum(sizes) // self.nodes),)
        return (counts[0], sizes[0]), (counts[1], sizes[1])

    def simulated(self, counts: tuple[int, ...], router: str) -> Phases:
        """So many of each."""
        return self.phases.times(*counts)

    def more(self, counts: tuple[int, ...], each: dict[str, float]) -> tuple[int, ...]:
        """One instance more of the phase that keeps its bound least, of both where they are pairs."""
        prefill, decode = counts
        if self.pair is not None:
            return prefill + 1, decode + 1
        first = min((share for key, share in each.items() if key != "tpot"), default=0.0)
        return (prefill, decode + 1) if each.get("tpot", 1.0) < first else (prefill + 1, decode)

    def score(self, rate: float | None) -> Score:
        if self.pair is not None:
            ((_, size),) = self.groups((1, 1))
            return score(self.rent, size, self.pair, rate, self.nodes)
        each = sum(score(self.rent, one.candidate.devices, one.rate, None)[1] for one in (self.prefill, self.decode))
        whole = each if rate is None else self.rent.cost(*self.groups(self.counts(rate)))
        assert whole is not None
        return whole, each


def joined(prefill: Candidate, decode: Candidate, link: Link, *, paired: bool) -> Phases:
    """One of each, configured alike, as `serve` configures its workers: the first's policy and budget, the second's most sequences."""
    chosen = {"policy": prefill.scenario.config.policy, "max_batch_tokens": prefill.scenario.config.max_batch_tokens}
    config = decode.scenario.config.model_copy(update=chosen)
    first, second = (replace(one.scenario, config=config, phase="both") for one in (prefill, decode))
    return Phases(first, second, link, paired)


def refusal(objective: Objective, moments: Moments, kv_policy: str) -> str | None:
    """Why no phase of its own can be planned for; None where it can."""
    if kv_policy != "dense":
        return f"kv_policy {kv_policy} keeps or reads parts of a sequence, and prefill instances hand over plain keys and values"
    if objective.per_token is None or (objective.first_token is None and objective.wait is None):
        return "the objective bounds one phase only: prefill instances are chosen by ttft (or wait), decode instances by tpot"
    return None if moments.decodes > 0 else "answers of one token leave nothing to decode"


def disaggregate(
    fitting: Iterable[Candidate],
    demand: Demand,
    objective: Objective,
    moments: Moments,
    *,
    rate: float | None = None,
    rank: Rank = "dollars",
    best: Score | None = None,
    tolerance: float = TOLERANCE,
    told: Told | None = None,
) -> tuple[list[Apart], list[Pruned]]:
    """Both algorithms for each kind of hardware among `fitting`, candidates as of replicas; and what was not pursued.

    An option that does not score better than `best` by what its phases promise is not simulated.
    """
    options: list[Apart] = []
    pruned: list[Pruned] = []
    kinds: dict[str, list[Candidate]] = {}
    for candidate in fitting:
        kinds.setdefault(candidate.cluster, []).append(candidate)
    for text, mine in kinds.items():
        if (DEVICES if rank == "devices" else mine[0].rent).price is None:
            continue  # said of the replicas
        phases: list[list[Instance]] = []
        for phase in ("prefill", "decode"):
            found, less = instances(mine, phase, demand, objective, moments, rank, tolerance, told)
            phases.append(found)
            pruned += less
        if not all(phases):
            continue
        prefills, decodes = phases
        try:
            options.append(separately(text, prefills, decodes, rank))
        except InputError as error:
            pruned.append(Pruned(f"prefill and decode instances of {text}", "layout", error.problem, error.fix))
        pair, less = pairs(text, prefills, decodes, demand, objective, rate, rank, best, tolerance, told)
        options += [] if pair is None else [pair]
        pruned += less
    return sorted(options, key=lambda one: one.score(rate)), pruned


def of_phase(objective: Objective, phase: Phase) -> Objective:
    """The bounds that are of this phase."""
    return replace(objective, per_token=None) if phase == "prefill" else replace(objective, first_token=None, wait=None)


def instances(
    candidates: list[Candidate],
    phase: Phase,
    demand: Demand,
    objective: Objective,
    moments: Moments,
    rank: Rank,
    tolerance: float = TOLERANCE,
    told: Told | None = None,
) -> tuple[list[Instance], list[Pruned]]:
    """Instances for one phase, the one that serves most for its price first; of the others only bounds are known.

    How many tokens a prompt's iteration has matters to prompts, how many sequences run to answers: the other is as large as it may be.
    """
    mine = of_phase(objective, phase)
    asked = replace(moments, answer=1.0, decodes=0.0, read=0.0) if phase == "prefill" else replace(moments, prompt=0.0)
    hopeful: list[tuple[Candidate, Ceiling, Rent]] = []
    pruned: list[Pruned] = []
    for candidate in _schedulings(candidates, phase):
        own = replace(candidate, scenario=replace(candidate.scenario, phase=phase))
        config, name = own.scenario.lane, f"{phase} {candidate.name}"
        assert config.kv_blocks is not None
        pool, longest = config.kv_blocks * config.block_size, demand.longest(own.scenario.context)
        if pool < longest:
            pruned.append(Pruned(name, "memory", f"its KV cache holds {pool:,} tokens, and the longest request has {longest:,}"))
        elif (miss := alone(own, demand, objective).misses(mine)) is not None:
            pruned.append(Pruned(name, "alone", miss))
        else:
            hopeful.append((own, ceiling(own, asked), DEVICES if rank == "devices" else own.rent))
    hopeful.sort(key=lambda one: score(one[2], one[0].devices, one[1].rate, None))
    found: list[Instance] = []
    best: Score | None = None
    for place, (candidate, most, cost) in enumerate(hopeful):
        enough = 0.0 if best is None else as_good(best, cost, candidate.devices, None)
        if enough >= most.rate:
            found.append(Instance(candidate, most, most.rate, None))
            continue
        served = capacity(candidate.scenario, demand, mine, tolerance=tolerance, enough=enough, most=most.rate)
        if served.rate:
            found.append(Instance(candidate, most, served.rate, served))
            best = min(score(cost, candidate.devices, served.rate, None), best or (math.inf, math.inf))
        elif served.probes and enough:
            found.append(Instance(candidate, most, enough, None))
        else:
            pruned.append(Pruned(f"{phase} {candidate.name}", "objective", f"it keeps {mine} at no rate"))
        if told is not None:
            told(place + 1, len(hopeful), f"{phase} {candidate.name}")
    # What is known exactly goes before what is only bounded.
    return sorted(found, key=lambda one: (one.capacity is None, _promise(one, rank))), pruned


def separately(text: str, prefills: list[Instance], decodes: list[Instance], rank: Rank) -> Apart:
    """Algorithm 1: the best of each phase. Raises InputError where no link joins instances that lie anywhere."""
    prefill, decode = prefills[0], decodes[0]
    devices = prefill.candidate.devices + decode.candidate.devices
    place = _place(text, devices)
    far = place.rack is None and place.network is not None
    link = transfer_link(place, prefill.candidate.deployment, decode.candidate.deployment, near=not far)
    return Apart(prefill, decode, link, DEVICES if rank == "devices" else prefill.candidate.rent)


def pairs(
    text: str,
    prefills: list[Instance],
    decodes: list[Instance],
    demand: Demand,
    objective: Objective,
    rate: float | None,
    rank: Rank,
    best: Score | None = None,
    tolerance: float = TOLERANCE,
    told: Told | None = None,
) -> tuple[Apart | None, list[Pruned]]:
    """Algorithm 2: the best pair whose stages of the same layers share a node, by simulating it."""
    tried: list[tuple[Score, float, Apart]] = []
    for prefill in _best_of_layouts(prefills, rank):
        for decode in _best_of_layouts(decodes, rank):
            nodes = _nodes(text, prefill.candidate, decode.candidate)
            if nodes is None:
                continue
            try:
                place = _place(text, (prefill.candidate.devices + decode.candidate.devices) // nodes)
                link = transfer_link(place, prefill.candidate.deployment, decode.candidate.deployment, near=True)
            except InputError:
                continue  # a single device: it has nobody to be paired with
            most = min(prefill.ceiling.rate, decode.ceiling.rate, _SMOOTHED * prefill.bound, _SMOOTHED * decode.bound)
            hoped = Apart(prefill, decode, link, DEVICES if rank == "devices" else prefill.candidate.rent, most, nodes)
            tried.append((hoped.score(rate), most, hoped))
    tried.sort(key=lambda one: one[0])
    pruned: list[Pruned] = []
    found: Apart | None = None
    for place_, (promise, most, hoped) in enumerate(tried):
        if best is not None and promise >= best:
            pruned.append(Pruned(hoped.name, "ceiling", f"its phases promise at most {most:.3g} requests a second a pair"))
            continue
        ((_, size),) = hoped.groups((1, 1))
        enough = 0.0 if best is None else as_good(best, hoped.rent, size, rate, hoped.nodes)
        served = capacity(hoped.phases, demand, objective, tolerance=tolerance, enough=enough, most=most)
        if served.rate:
            found = replace(hoped, pair=served.rate, capacity=served)
            best = found.score(rate)
        else:
            why = f"at {enough:.3g} requests a second a pair, which would be as good, it does not hold" if enough else "it holds at no rate"
            pruned.append(Pruned(hoped.name, "beaten" if enough else "objective", why))
        if told is not None:
            told(place_ + 1, len(tried), hoped.name)
    return found, pruned


def _schedulings(candidates: list[Candidate], phase: Phase) -> list[Candidate]:
    """Those that differ in what matters to a phase."""
    configs = [one.scenario.config for one in candidates]
    running, budget, policy = max(c.max_running for c in configs), max(c.max_batch_tokens for c in configs), configs[0].policy
    if phase == "prefill":
        return [one for one in candidates if one.scenario.config.max_running == running]
    return [one for one in candidates if one.scenario.config.max_batch_tokens == budget and one.scenario.config.policy == policy]


def _promise(one: Instance, rank: Rank) -> Score:
    return score(DEVICES if rank == "devices" else one.candidate.rent, one.candidate.devices, one.rate, None)


def _best_of_layouts(found: list[Instance], rank: Rank) -> list[Instance]:
    """Of each layout and format the instance that promises most."""
    best: dict[str, Instance] = {}
    for one in sorted(found, key=lambda one: _promise(one, rank)):
        best.setdefault(one.candidate.place, one)
    return list(best.values())


def _place(text: str, devices: int) -> Cluster:
    """The hardware that `text` names, with at least so many devices where it is a bare one."""
    place = cluster(text)
    if place.devices > 1 or devices == 1:
        return place
    if text.endswith((".json", ".toml")):  # a file says what there is
        raise InputError(f"{text} is one engine that has the whole machine", f"2x{text} is two that share it")
    return cluster(f"{text}x{devices}")


def _nodes(text: str, prefill: Candidate, decode: Candidate) -> int | None:
    """The fewest nodes over which both can be cut into as many segments of the same layers, one of each to a node; None where there are none."""
    place = cluster(text)
    size, most = (NODE, 1) if place.devices == 1 else (place.domain, place.nodes // place.domain_nodes)
    stages = math.gcd(prefill.deployment.layout.pipeline_parallel, decode.deployment.layout.pipeline_parallel)
    devices = prefill.devices + decode.devices
    return next((nodes for nodes in range(1, min(stages, most) + 1) if stages % nodes == 0 and devices // nodes <= size), None)
