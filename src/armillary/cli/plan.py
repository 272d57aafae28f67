"""`armillary plan`: the cheapest hardware and configuration that keep an objective."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, Group, Parameter

from armillary.cli.settings import WORKLOAD, Acceptance, ConfigFile, EngineFlags, Json, Lengths, PublishedModel, Variation, settle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from armillary.models.config import ModelConfig
    from armillary.plan.candidates import Candidate, Pruned, Space
    from armillary.plan.demand import Demand
    from armillary.serve.config import EngineConfig

plan = App(name="plan")
for _name, _line in {
    "offload": "A model larger than its accelerator, over its memory, RAM and disk (FlexGen).",
    "overlap": "Nano-batches that use a device's compute, memory and network at once (NanoFlow).",
    "partition": "How a dense model lies over chips, for prefill and for decode (Pope et al.).",
}.items():
    plan.command(f"armillary.cli.plan_{_name}:{_name}", name=_name, help=_line)

_SPACE = Group("What is tried (commas between)", sort_key=1)
_ONE: dict[str, str] = {"policies": "policy", "budgets": "max_batch_tokens", "running": "max_running", "weights": "quantize"}
"""Lists of the search, and the option of the engine that names one."""


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, slots=True)
class SpaceFlags:
    """`plan.candidates.Space` as flags."""

    cluster: Annotated[
        str, Parameter(group=_SPACE, help="Devices or nodes, such as h100,a100 or dgx-h100 (armillary cluster lists them).")
    ] = "h100"
    tensor_parallel: Annotated[str, Parameter(name=("--tensor-parallel", "--tp"), group=_SPACE, help="Devices that split each layer.")] = (
        "1,2,4,8"
    )
    pipeline_parallel: Annotated[
        str | None,
        Parameter(
            name=("--pipeline-parallel", "--pp"),
            group=_SPACE,
            show_default=False,
            help="Stages of layers (default: the fewest with which the model fits).",
        ),
    ] = None
    policies: Annotated[
        str | None, Parameter(group=_SPACE, show_default=False, help="Who runs when (default: sarathi; or --policy for one).")
    ] = None
    budgets: Annotated[
        str | None, Parameter(group=_SPACE, show_default=False, help="Tokens an iteration (default: 512,1024,2048; or --max-batch-tokens).")
    ] = None
    running: Annotated[
        str | None, Parameter(group=_SPACE, show_default=False, help="Sequences in flight (default: 64,256; or --max-running).")
    ] = None
    weights: Annotated[
        str | None,
        Parameter(group=_SPACE, show_default=False, help="Formats of weights (default: fp16, or what a profile measured; or --quantize)."),
    ] = None


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, slots=True)
class DemandFlags:
    """What comes."""

    lengths: Lengths = "conversation"
    variation: Variation = 1.0
    acceptance: Acceptance = None
    trace: Annotated[
        Path | None,
        Parameter(
            group=WORKLOAD, help="Recorded requests instead, as simulate serve takes them: every rate is all of them.", show_default=False
        ),
    ] = None
    speed: Annotated[float, Parameter(group=WORKLOAD, help="How many times as fast the trace must be served, instead of --rate.")] = 1.0
    requests: Annotated[
        int | None, Parameter(group=WORKLOAD, help="How many of the trace, the first (default: all).", show_default=False)
    ] = None
    cut: Annotated[
        bool, Parameter(group=WORKLOAD, negative=(), help="Shorten requests of the trace that exceed the context, answers first.")
    ] = False


@plan.command(name="serve")
def serve(
    model: PublishedModel,
    /,
    *,
    slo: Annotated[str, Parameter(help="Bounds that a share of the requests must keep: ttft=300ms,tpot=50ms,wait=5s,attainment=0.9.")],
    rate: Annotated[
        float | None, Parameter(help="Requests a second that are to be served, over all replicas (of a trace: see --speed).")
    ] = None,
    space: SpaceFlags = SpaceFlags(),
    demand: DemandFlags = DemandFlags(),
    rank: Annotated[Literal["dollars", "devices"], Parameter(help="What the best has least of.")] = "dollars",
    keep: Annotated[int, Parameter(help="How many of the best are found.")] = 3,
    disaggregate: Annotated[
        Literal["auto", "always", "never"],
        Parameter(help="Prompts and answers on instances of their own: where that is better, in any case, or not at all."),
    ] = "auto",
    tolerance: Annotated[
        float, Parameter(help="Relative bracket of a replica's capacity; a narrower one takes more requests, and so longer.")
    ] = 0.1,
    router: Annotated[
        str, Parameter(help="Who gets a request: power-of-two, shortest-queue, cache-aware, round-robin, consistent-hash.")
    ] = ("power-of-two"),
    host_us: Annotated[float, Parameter(help="Microseconds an iteration beside the device: schedule, launch, tokens out.")] = 0.0,
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    config: ConfigFile = None,
    output: Annotated[Path | None, Parameter(help="Write the plan: `armillary serve --plan` executes it where its hardware is.")] = None,
    html: Annotated[Path | None, Parameter(help="Write the report: candidates, their arithmetic, the capacity curve.")] = None,
    json: Json = False,
) -> None:
    """Find what serves the model at least cost under an objective, by the engine itself in virtual time."""
    from armillary.cli.plan_files import checked_folder, printed
    from armillary.cli.plan_told import facts, tell
    from armillary.cli.terminal import print_json
    from armillary.models.graph.find import find
    from armillary.plan.candidates import candidates, in_fewest_stages
    from armillary.plan.choice import choose
    from armillary.plan.choice import find as options
    from armillary.plan.file import chosen
    from armillary.plan.objective import parse
    from armillary.serve.policies import routing
    from armillary.serve.simulation.acceptance import parse as parse_acceptance
    from armillary.sim.costs.overlapped import host_ns

    checked_folder(output, html)
    here, formats = _here(model, space.cluster)
    own = {"engine.max_queue": 1_000_000} | ({} if formats else {"engine.kv_dtype": "fp16"})
    settled = settle(model, engine, file=config, defaults=own)
    tried = _space(space, settled.value.engine, settled.provenance, formats)
    host = host_ns(host_us)
    objective, (asked, rate) = parse(slo), _asked(demand, rate, settled.value.engine.seed)
    routing.get(router)
    acceptance = parse_acceptance(demand.acceptance) if demand.acceptance is not None else None
    architecture = find(model)

    def of(some: Space) -> Iterator[Candidate | Pruned]:
        return candidates(architecture, some, settled.value.engine, host, here, acceptance=acceptance)

    every, size = (of(tried), tried.size) if space.pipeline_parallel is not None else in_fewest_stages(of, tried)
    with _progress() as told:
        found = options(
            every,
            asked,
            objective,
            apart=disaggregate,
            rate=rate,
            rank=rank,
            keep=keep,
            tolerance=tolerance,
            told=told,
        )
        best, found = choose(found, asked, objective, rate, router)
    file = chosen(model, best, found, asked, objective, rate, router, size)
    if output is not None:
        file.save(output)
    if html is not None:
        from armillary.web.plan_report import write_plan_report

        write_plan_report(file, found, objective, html)
    if json:
        print_json(facts(file, found))
    else:
        tell(file, found, asked)
        printed(output, html)


def _asked(flags: DemandFlags, rate: float | None, seed: int) -> tuple[Demand, float]:
    """What comes, and how many a second are to be served."""
    from armillary.core.errors import InputError
    from armillary.plan.demand import Demand
    from armillary.plan.recorded import RecordedDemand
    from armillary.serve.workload.lengths import named

    usual = DemandFlags()
    if flags.trace is None:
        for name in ("speed", "requests", "cut"):
            if getattr(flags, name) != getattr(usual, name):
                raise InputError(f"{name} is of a trace, and none is given", "give --trace, or leave it out", field=name)
        if rate is None:
            raise InputError("how many requests a second are to be served is not said", "give --rate, such as --rate 20", field="rate")
        return Demand(named(flags.lengths), flags.variation, seed), rate
    for name in ("lengths", "variation"):
        if getattr(flags, name) != getattr(usual, name):
            raise InputError(f"a trace has its own {name}", "leave one of them out", field=name)
    if rate is not None:
        raise InputError("a trace has its own rate", "give --speed, such as --speed 2", field="rate")
    if not 1e-6 <= flags.speed <= 1e6:
        raise InputError(f"a trace cannot be served {flags.speed:g} times as fast", "give 0.000001 to 1000000", field="speed")
    if flags.requests is not None and flags.requests < 2:
        raise InputError(f"{flags.requests} requests have no rate", "give at least 2", field="requests")
    asked = RecordedDemand.read(flags.trace, most=flags.requests, cut=flags.cut, seed=seed)
    return asked, asked.rate * flags.speed


def _here(model: str, places: str) -> tuple[ModelConfig | None, tuple[str, ...]]:
    """The model's configuration where a profile of a machine is among the `places` and it could run there, and, where all are such profiles,
    the formats of weights that were measured of it."""
    from armillary.cluster.profile import load, spelled
    from armillary.core.errors import InputError, NotFoundError
    from armillary.models.graph.find import runnable
    from armillary.serve.calibration import formats

    profiles = [found[0] for word in _words("cluster", places) if (found := spelled(word)) is not None]
    if not profiles:
        return None, ()
    try:
        here = runnable(model)
    except (InputError, NotFoundError):  # a name that nobody knows is told of when its architecture is looked for
        return None, ()
    if len(profiles) < len(_words("cluster", places)):
        return here, ()
    return here, tuple(dict.fromkeys(name for path in profiles for name in formats(load(path), here)))


def _space(flags: SpaceFlags, engine: EngineConfig, provenance: Any, measured: tuple[str, ...]) -> Space:
    """The lists of the search. An option of the engine that was given stands for a list of one; `measured` formats of weights are the default."""
    from armillary.core.errors import InputError
    from armillary.plan.candidates import Space

    given: dict[str, Any] = {"policies": ("sarathi",), "budgets": (512, 1024, 2048), "running": (64, 256), "weights": measured or ("fp16",)}
    for name, single in _ONE.items():
        text, alone = getattr(flags, name), provenance[f"engine.{single}"] != "default"
        if text is not None and alone:
            raise InputError(f"{name} and {single} are both given", "give one of them", field=name)
        if alone:
            given[name] = (getattr(engine, single),)
        elif text is not None:
            given[name] = _words(name, text) if name in ("policies", "weights") else _numbers(name, text)
    return Space(
        _words("cluster", flags.cluster),
        _numbers("tensor_parallel", flags.tensor_parallel),
        (1,) if flags.pipeline_parallel is None else _numbers("pipeline_parallel", flags.pipeline_parallel),
        **given,
    )


def _words(name: str, text: str) -> tuple[str, ...]:
    from armillary.core.errors import InputError

    words = tuple(word.strip() for word in text.split(","))
    if not all(words):
        raise InputError(f"{name} is {text[:80]!r}", "write names with commas between", field=name)
    return words


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from armillary.core.errors import InputError

    words = _words(name, text)
    if not all(re.fullmatch("[0-9]{1,9}", word) for word in words):
        raise InputError(f"{name} is {text[:80]!r}", "write whole numbers with commas between", field=name)
    return tuple(int(word) for word in words)


def _progress() -> Any:
    """A callback of the search: what is done is told on stderr, in place on a terminal."""
    import sys
    import time
    from contextlib import contextmanager

    from armillary.cli.terminal import note

    @contextmanager
    def progress() -> Any:
        began = said = time.monotonic()

        def told(done: int, all_of_them: int, name: str) -> None:
            nonlocal said
            if sys.stderr.isatty():
                print(f"\r\033[K{done} of {all_of_them} candidates, {name}", end="", file=sys.stderr, flush=True)
            elif time.monotonic() - said >= 10:
                said = time.monotonic()
                note(f"{done} of {all_of_them} candidates")

        yield told
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        note(f"searched in {time.monotonic() - began:.1f} s")

    return progress()
