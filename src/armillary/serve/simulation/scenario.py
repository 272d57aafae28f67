"""What is simulated: replicas of a deployed model, configured as `serve` is, behind a router; and what came out."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Final, Literal

from armillary.core.clock import VirtualClock
from armillary.core.errors import CapacityError, InputError
from armillary.core.trace import Trace
from armillary.models.graph.cost import Deployment
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.history import EngineStats
from armillary.serve.policies import routing
from armillary.serve.policies.routing.hedging import Hedging
from armillary.serve.request import Request
from armillary.serve.simulation.acceptance import Acceptance
from armillary.serve.simulation.adapters import Adapters
from armillary.serve.simulation.cluster import Cluster
from armillary.serve.simulation.drafts import Drafting, draft_of
from armillary.serve.simulation.engine import VirtualEngine
from armillary.serve.simulation.kept import attending, kept
from armillary.serve.simulation.memory import pool
from armillary.serve.simulation.pipeline import Lane, Pipeline, busy
from armillary.serve.simulation.recorder import Recorder, Result
from armillary.serve.simulation.tail import Answers, Kind, SecondCopies, TailStats
from armillary.serve.simulation.watched import Gate, WatchedEngine
from armillary.serve.workload.requests import Source
from armillary.sim.costs import CostModel
from armillary.sim.costs.overlapped import Overlapped
from armillary.sim.costs.roofline import Roofline
from armillary.sim.costs.table import Table

MOST_REPLICAS: Final = 100_000
Phase = Literal["both", "prefill", "decode"]
"""What of requests is simulated: prompts and answers; prompts alone, each to its first token; or answers alone, whose prompts and first tokens
are there when they come."""


@dataclass(frozen=True, slots=True)
class Run:
    """A simulation's end. `wall` is what it took here, s; `blocks` the KV blocks of a replica; `busy` ns of iterations, of all replicas together
    (of a stage on average, where several batches are in flight over them)."""

    result: Result
    stats: EngineStats  # of all replicas together
    blocks: int
    wall: float
    busy: int
    tail: TailStats | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """`replicas` of `deployment`, each an engine of `config` whose iterations take what `cost` says (by default the deployment's roofline).

    Where `config` speculates, drafts are right as `acceptance` says; what a draft model computes takes what `draft_cost` says (by default its
    roofline on the same devices). `tail` and `hedge_budget` are a fleet's. `adapters` lie in the devices' memory and cost those
    that ask for them. `pipeline_batches` of a replica are in flight over its pipeline stages (default: as many as stages where nothing but
    replicas of plain engines is asked for, else one), each with a scheduler and its part of the KV pool. Raises InputError for what has no model
    in virtual time yet, naming it.
    """

    deployment: Deployment
    config: EngineConfig
    replicas: int = 1
    router: str = "power-of-two"
    cost: CostModel | None = None
    fast_forward: bool = True
    phase: Phase = "both"
    acceptance: Acceptance | None = None
    draft_cost: CostModel | None = None
    tail: Kind = "none"
    hedge_budget: float = 0.05
    adapters: Adapters | None = None
    pipeline_batches: int | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.replicas <= MOST_REPLICAS:
            raise InputError(f"{self.replicas:,} replicas are asked for", f"give 1 to {MOST_REPLICAS:,}", field="replicas")
        routing.get(self.router)
        if self.tail != "none" and self.replicas < 2:
            raise InputError(f"tail {self.tail} sends requests to two replicas, and there is one", "give at least 2", field="tail")
        if not 0 <= self.hedge_budget <= 1:
            raise InputError(f"a hedge_budget of {self.hedge_budget:g}", "give a share from 0 to 1", field="hedge_budget")
        config = self.config
        for name, wanted, why, fix in (
            ("offload", config.offload is not None, "moves weights, keys and values between three tiers by shares that no batch tells of",
             "price a placement with `armillary plan offload`"),
            ("sparsity", config.sparsity is not None, "computes the neurons that its predictors name, and their number is the text's", "simulate without it"),
            ("lora", bool(config.lora), "is of adapters that are files", "give --adapters and --adapter-rank instead"),
        ):  # fmt: skip
            if wanted:
                raise InputError(f"{name} has no cost model: it {why}", fix, field=name)
        if self.adapters is not None:
            self.adapters.check(self.deployment, config)
        if config.speculate != "off" and self.acceptance is None:
            raise InputError(
                f"how often the drafts of speculate {config.speculate} are right is the workload's to say",
                "give --acceptance, such as 0.7",
                field="acceptance",
            )
        if config.speculate == "off" and self.acceptance is not None:
            raise InputError(
                f"an acceptance of {self.acceptance} says nothing where nobody drafts",
                "give --speculate, or leave it out",
                field="acceptance",
            )
        stages, batches = self.deployment.layout.pipeline_parallel, self.pipeline_batches
        if batches is not None and not 1 <= batches <= (stages if self._plain else 1):
            raise InputError(
                f"{batches} batches are to be in flight over {stages} pipeline stages"
                + ("" if self._plain else " with drafts, schedules made ahead, a KV policy, adapters or second copies"),
                f"give {f'1 to {stages}' if self._plain else '1'}, or leave it out",
                field="pipeline_batches",
            )
        draft_of(self.deployment, config)  # it may not be possible ...
        kept(self.deployment, config)
        if self.cost is None:
            object.__setattr__(self, "cost", attending(self.deployment, config).roofline())
        elif config.kv_policy != "dense" and not isinstance(self.cost, Roofline | Table | Overlapped):
            raise InputError(
                f"{self.cost.name} does not know what kv_policy {config.kv_policy} reads",
                "simulate with --kv-policy dense",
                field="kv_policy",
            )

    @property
    def _plain(self) -> bool:
        config = self.config
        engine = config.speculate == "off" and config.async_scheduling == "off" and config.kv_policy == "dense"
        return engine and self.tail == "none" and self.adapters is None

    @property
    def in_flight(self) -> int:
        """Batches of a replica that are computed at one time."""
        if self.pipeline_batches is not None:
            return self.pipeline_batches
        return self.deployment.layout.pipeline_parallel if self._plain else 1

    @property
    def lane(self) -> EngineConfig:
        """What a batch in flight has: `settled` with its part of the KV pool. Raises CapacityError for a part without a block."""
        settled, lanes = self.settled, self.in_flight
        assert settled.kv_blocks is not None
        if settled.kv_blocks < lanes:
            raise CapacityError(f"{settled.kv_blocks} KV blocks are not one for each of {lanes} batches in flight", "use more devices")
        return settled if lanes == 1 else settled.model_copy(update={"kv_blocks": settled.kv_blocks // lanes})

    @property
    def draft(self) -> Deployment | None:
        """What computes drafts beside the model."""
        return draft_of(self.deployment, self.config)

    @property
    def drafting(self) -> Drafting | None:
        """Who proposes tokens; None where nobody does."""
        if self.acceptance is None:
            return None
        draft = self.draft
        if draft is None:
            return Drafting(self.acceptance)
        return Drafting(self.acceptance, self.draft_cost if self.draft_cost is not None else draft.roofline(), draft.model.max_context)

    @property
    def devices(self) -> int:
        """Of all replicas."""
        return self.deployment.layout.devices * self.replicas

    @property
    def settled(self) -> EngineConfig:
        """The configuration with the KV pool that the device has, and the model's context."""
        config, model = self.config, self.deployment.model
        blocks = config.kv_blocks if config.kv_blocks is not None else self._kv_blocks()
        context = config.context if config.context is not None else model.max_context
        if context > model.max_context and not config.kv.unbounded:
            raise InputError(
                f"context {context:,} is more than the {model.max_context:,} tokens of {model.name}", "give less", field="context"
            )
        return config.model_copy(update={"kv_blocks": blocks, "kv_memory": None, "context": context})

    def _kv_blocks(self) -> int:
        reserved = self.adapters.held(self.deployment) if self.adapters is not None else 0
        return pool(self.deployment, self.config, self.draft, reserved)

    @property
    def priced(self) -> CostModel:
        """What an iteration costs."""
        assert self.cost is not None
        return self.cost

    @property
    def context(self) -> int:
        """Most tokens of a request."""
        context = self.settled.context
        assert context is not None
        return context

    def single(self) -> Scenario:
        """One replica of it."""
        return replace(self, replicas=1, tail="none")

    def run(self, requests: Iterable[Request] | Source, *, trace: Trace | None = None, watched: Gate | None = None) -> Run:
        """`requests`, in the order of their arrival, to their end. A trace shows one replica, for lanes are requests; `watched` stops it to be looked at.
        A `Source` hears of those that end, and others may come of it.

        Raises InputError for a request that could never run, and CapacityError when a queue passes its bound.
        """
        if trace is not None and self.replicas > 1:
            raise InputError(f"a trace of {self.replicas:,} replicas would mix their iterations", "trace one replica", field="replicas")
        lanes = self.in_flight
        if (trace is not None or watched is not None) and lanes > 1:
            raise InputError(
                f"one batch is shown at a time, and {lanes} are in flight over the pipeline's stages", "simulate with --pipeline-batches 1",
                field="pipeline_batches",
            )  # fmt: skip
        if isinstance(requests, Source) and self.phase != "both":
            raise InputError(
                f"what comes depends on what has ended, and {self.phase} alone ends nothing", "simulate both phases", field="phase"
            )
        cost, config, drafting, keeps = self.priced, self.lane, self.drafting, kept(self.deployment, self.config)
        reads = None if keeps is None else keeps.read
        stages = self.deployment.stages() if lanes > 1 else []
        pipelines = [Pipeline(len(stages), lanes) for _ in range(self.replicas)] if lanes > 1 else []
        recorder = Recorder(requests.ended if isinstance(requests, Source) else None)
        answers = Answers(recorder) if self.tail != "none" else None
        adapters = self.adapters.priced(self.deployment) if self.adapters is not None else None

        def engine(index: int) -> VirtualEngine:
            clock, seen = VirtualClock(), watched is not None and index == watched.replica
            kind = WatchedEngine if seen else VirtualEngine
            return kind(
                Lane(clock, cost, pipelines[index // lanes], stages, reads)
                if pipelines
                else VirtualExecutor(clock, cost, reads=reads, beside=None if adapters is None else adapters.of),
                config,
                trace=trace,
                drafter=None if drafting is None else drafting.drafter(config, clock),
                recorder=recorder if answers is None else answers,
                fast_forward=self.fast_forward,
                told=trace is not None or seen,
            )

        engines = [engine(index) for index in range(self.replicas * lanes)]
        if watched is not None:
            watched.take(engines[watched.replica])
        router = routing.get(self.router)
        if answers is None:
            group = Cluster(engines, router, seed=config.seed, lanes=lanes)
        else:
            group = SecondCopies(engines, router, answers, seed=config.seed, kind=self.tail, hedging=Hedging(self.hedge_budget))
        began = time.perf_counter()
        gc.freeze()  # thousands of engines stay until the end: nobody need look again and again whether they are garbage
        try:
            group.run(requests if isinstance(requests, Source) else _PHASES[self.phase](requests))
        finally:
            gc.unfreeze()
        wall = time.perf_counter() - began
        blocks = self.settled.kv_blocks
        assert blocks is not None
        copies = group.stats if isinstance(group, SecondCopies) else None
        return Run(recorder.result(), summed([engine.stats for engine in engines]), blocks, wall, busy(engines), copies)


def summed(stats: Iterable[EngineStats]) -> EngineStats:
    """The counters of several engines as one's."""
    whole = EngineStats()
    for one in stats:
        for name in EngineStats.__dataclass_fields__:
            mine, its = getattr(whole, name), getattr(one, name)
            if isinstance(its, int):
                setattr(whole, name, mine + its)
            elif isinstance(its, list):
                setattr(whole, name, [a + b for a, b in zip(mine, its, strict=True)])
            else:
                setattr(whole, name, {key: mine[key] + its[key] for key in its})
    return whole


def prompts_alone(requests: Iterable[Request]) -> Iterator[Request]:
    """Each until its first token."""
    return (replace(request, sampling=replace(request.sampling, max_tokens=min(1, request.sampling.max_tokens))) for request in requests)


def answers_alone(requests: Iterable[Request]) -> Iterator[Request]:
    """Those that want more than one token: keys, values and the first token come with them."""
    for request in requests:
        if request.sampling.max_tokens > 1:
            at = request.arrival
            yield replace(request, delivered=len(request.prompt), output=[0], first_token=at, last_token=at)


_PHASES: Final[dict[Phase, Callable[[Iterable[Request]], Iterable[Request]]]] = {
    "both": lambda requests: requests, "prefill": prompts_alone, "decode": answers_alone,
}  # fmt: skip
