"""What is simulated, made of flags: the model on its hardware, one engine or many, prompts and answers together or apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from armillary.cli.settings import EngineFlags, settle
from armillary.cli.workload import Workload

if TYPE_CHECKING:
    from armillary.models.graph.cost import Deployment
    from armillary.serve.config import EngineConfig
    from armillary.serve.simulation.acceptance import Acceptance as Rates
    from armillary.serve.simulation.phases import Phases
    from armillary.serve.simulation.scenario import Scenario
    from armillary.sim.costs import CostModel

_HARDWARE = Group("Hardware", sort_key=1)


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, slots=True)
class Hardware:
    """Where a replica runs, and how many there are."""

    cluster: Annotated[
        str | None,
        Parameter(
            group=_HARDWARE,
            show_default=False,
            help="Devices, such as h100 (the default; else those of --profile), 8xh100 or dgx-a100:4 (armillary cluster lists them).",
        ),
    ] = None
    tensor_parallel: Annotated[
        int, Parameter(name=("--tensor-parallel", "--tp"), group=_HARDWARE, help="Devices that split each layer.")
    ] = 1
    pipeline_parallel: Annotated[
        int,
        Parameter(name=("--pipeline-parallel", "--pp"), group=_HARDWARE, help="Stages of layers, as many batches in flight over them."),
    ] = 1
    pipeline_batches: Annotated[
        int | None,
        Parameter(group=_HARDWARE, show_default=False, help="Batches in flight over the stages (default: as many as stages)."),
    ] = None
    replicas: Annotated[int, Parameter(group=_HARDWARE, help="Engines behind the router.")] = 1
    router: Annotated[str, Parameter(group=_HARDWARE, help="power-of-two, shortest-queue, cache-aware, round-robin, consistent-hash.")] = (
        "power-of-two"
    )
    prefill_workers: Annotated[
        int, Parameter(group=_HARDWARE, help="Engines for prompts alone (disaggregation), with --decode-workers; no --replicas then.")
    ] = 0
    decode_workers: Annotated[
        int, Parameter(group=_HARDWARE, help="Engines that generate alone, from keys and values that prefill workers computed.")
    ] = 0
    decode_tensor_parallel: Annotated[
        int | None,
        Parameter(name=("--decode-tensor-parallel", "--decode-tp"), group=_HARDWARE, help="Of decode workers (default: as --tp)."),
    ] = None
    decode_pipeline_parallel: Annotated[
        int | None,
        Parameter(name=("--decode-pipeline-parallel", "--decode-pp"), group=_HARDWARE, help="Of decode workers (default: as --pp)."),
    ] = None
    kv_link: Annotated[
        str | None,
        Parameter(
            group=_HARDWARE,
            help="What keys and values move over: fabric, network, or a link's name (default: the fabric where all workers share one).",
        ),
    ] = None
    tail: Annotated[
        Literal["none", "hedged", "tied"],
        Parameter(
            group=_HARDWARE, help="A second copy of a request: when it is late (hedged), or in two queues, one of which runs it (tied)."
        ),
    ] = "none"
    hedge_budget: Annotated[
        float | None,
        Parameter(group=_HARDWARE, show_default=False, help="Share of prompt tokens that hedging may compute twice (default 0.05)."),
    ] = None
    host_us: Annotated[
        float, Parameter(group=_HARDWARE, help="Microseconds an iteration beside the device: schedule, launch, tokens out.")
    ] = 0.0
    profile: Annotated[
        str | None,
        Parameter(
            group=_HARDWARE,
            help="What was measured: a100, h100 (Llama-2 7B, 70B), CSV files as Vidur's, separated by commas; or profile.json of armillary "
            "calibrate --model: this machine's own engine, with the options and defaults of serve.",
        ),
    ] = None


def simulated_of(
    model: str, hardware: Hardware, workload: Workload, engine: EngineFlags, config: Path | None, *, fast: bool = True
) -> Scenario | Phases:
    """Everything that is asked for, checked before anything runs."""
    from armillary.core.errors import InputError

    apart = hardware.prefill_workers or hardware.decode_workers
    for name in ("decode_tensor_parallel", "decode_pipeline_parallel", "kv_link"):
        if not apart and getattr(hardware, name) is not None:
            raise InputError(
                f"{name} is of decode workers, and none are asked for",
                "give --prefill-workers and --decode-workers, or leave it out",
                field=name,
            )
    scenario = _with_tail(_scenario(model, hardware, workload, engine, config, fast=fast), hardware, workload)
    return _phases(hardware, scenario) if apart else scenario


def _scenario(model: str, hardware: Hardware, workload: Workload, engine: EngineFlags, config: Path | None, *, fast: bool) -> Scenario:
    """Replicas, or of what is asked for the prefill workers."""
    from armillary.cluster.cluster import cluster
    from armillary.models.graph.cost import Deployment
    from armillary.models.graph.find import find
    from armillary.models.graph.layout import Layout
    from armillary.models.graph.precision import Precision
    from armillary.serve.simulation.acceptance import parse
    from armillary.sim.costs.profile import PACKAGED

    if hardware.profile is not None and hardware.profile.endswith(".json"):
        return _measured_scenario(model, hardware, engine, config, workload.acceptance, fast=fast)
    own: dict[str, Any] = {"engine.max_running": 128, "engine.max_queue": 1_000_000}
    given = settle(model, engine, file=config, defaults=own)
    formats = ("fp16", "fp16")
    asked = given.value.engine
    if (
        "native" in asked.kv.backends and asked.offload is None and asked.sparsity is None
    ):  # else an engine that runs here would refuse formats
        given = settle(model, engine, file=config, defaults={"engine.quantize": "fp16", "engine.kv_dtype": "fp16", **own})
        formats = (given.value.engine.quantize, given.value.engine.kv_dtype)
    settled = given.value.engine
    layout = Layout(tensor_parallel=hardware.tensor_parallel, pipeline_parallel=hardware.pipeline_parallel)
    acceptance = parse(workload.acceptance) if workload.acceptance is not None else None
    place = cluster(hardware.cluster if hardware.cluster is not None else hardware.profile if hardware.profile in PACKAGED else "h100")
    deployment = Deployment(find(model), place, layout, Precision.of(*formats))
    return _engines(deployment, settled, hardware, fast, acceptance)


def _engines(deployment: Deployment, settled: EngineConfig, hardware: Hardware, fast: bool, acceptance: Rates | None) -> Scenario:
    """Replicas of a deployment, with the cost model that is asked for."""
    from armillary.serve.simulation.drafts import draft_of
    from armillary.serve.simulation.kept import attending
    from armillary.serve.simulation.memory import pool
    from armillary.serve.simulation.scenario import Scenario
    from armillary.sim.costs.overlapped import host_ns, priced

    deployment = attending(deployment, settled)
    making: Callable[..., CostModel]
    draft_cost: CostModel | None = None  # the roofline
    if hardware.profile is not None:
        from armillary.models.graph.profiled import profiled
        from armillary.sim.costs.profile import profile

        measured = profile(hardware.profile)
        making = partial(profiled, deployment, measured)
        if settled.speculate == "layers" and (draft := draft_of(deployment, settled)) is not None:
            draft_cost = profiled(draft, measured)
    else:
        making = deployment.roofline
    cost = priced(making, host_ns(hardware.host_us), ahead=settled.async_scheduling == "on")
    if settled.kv_blocks is not None:
        pool(deployment, settled, draft_of(deployment, settled))  # no more than there is room for
    return Scenario(
        deployment, settled, hardware.replicas, hardware.router, cost, fast, acceptance=acceptance, draft_cost=draft_cost,
        pipeline_batches=hardware.pipeline_batches,
    )  # fmt: skip


def _measured_scenario(
    model: str, hardware: Hardware, engine: EngineFlags, config: Path | None, acceptance: str | None, *, fast: bool
) -> Scenario:
    """The engine that `armillary calibrate --model` measured, as `serve` would start it there."""
    from armillary.cluster.cluster import cluster
    from armillary.cluster.profile import load
    from armillary.core.errors import InputError
    from armillary.models.graph.cost import Deployment
    from armillary.models.graph.find import find, runnable
    from armillary.models.graph.layout import Layout
    from armillary.models.graph.precision import Precision
    from armillary.serve.calibration import cost_model
    from armillary.serve.simulation.measured import as_measured
    from armillary.serve.simulation.scenario import Scenario

    path = hardware.profile
    assert path is not None
    for name, given in (
        ("cluster", hardware.cluster not in (None, path)),
        ("tensor_parallel", hardware.tensor_parallel != 1),
        ("pipeline_parallel", hardware.pipeline_parallel != 1),
        ("pipeline_batches", hardware.pipeline_batches is not None),
        ("host_us", hardware.host_us != 0),
        ("prefill_workers", hardware.prefill_workers != 0),
        ("decode_workers", hardware.decode_workers != 0),
    ):
        if given:
            raise InputError(
                f"{path} has measured a whole engine on one machine, its host included",
                f"leave --{name.replace('_', '-')} out, or --profile",
                field=name,
            )
    settled = settle(model, engine, file=config, defaults={"engine.max_queue": 1_000_000}).value.engine
    if settled.speculate != "off" or acceptance is not None:
        raise InputError(f"{path} has measured no drafts", "simulate without --speculate and --acceptance", field="speculate")
    if settled.async_scheduling == "on":
        raise InputError(f"{path} has measured a host that waits for the device", "leave async_scheduling off", field="async_scheduling")
    shape = runnable(model)
    deployment = Deployment(find(model), cluster(path), Layout(), Precision.of(settled.quantize, settled.kv_dtype))
    cost = cost_model(load(Path(path)), shape, settled)
    settled = as_measured(settled, shape, cost, deployment.kv_memory)
    return Scenario(deployment, settled, hardware.replicas, hardware.router, cost, fast)


def _with_tail(scenario: Scenario, hardware: Hardware, workload: Workload) -> Scenario:
    """With second copies and adapters, as they are asked for."""
    from armillary.core.errors import InputError
    from armillary.serve.simulation.adapters import Adapters

    for name in ("adapter_rank", "adapter_skew"):
        if workload.adapters is None and getattr(workload, name) is not None:
            raise InputError(f"{name} is of adapters, and nobody asks for one", "give --adapters, or leave it out", field=name)
    rank = workload.adapter_rank if workload.adapter_rank is not None else 16
    adapters = Adapters(workload.adapters, rank) if workload.adapters is not None else None

    budget = hardware.hedge_budget
    if budget is not None and hardware.tail != "hedged":
        raise InputError(
            f"hedge_budget {budget:g} says nothing with tail {hardware.tail}", "leave it out, or choose tail hedged", field="hedge_budget"
        )
    return dataclasses.replace(
        scenario, tail=hardware.tail, hedge_budget=budget if budget is not None else scenario.hedge_budget, adapters=adapters
    )


def _phases(hardware: Hardware, scenario: Scenario) -> Phases:
    """The prefill and decode workers that are asked for, of which `scenario` has the engines of the first kind."""
    from armillary.cluster import catalogue
    from armillary.core.errors import InputError
    from armillary.models.graph.layout import Layout
    from armillary.serve.simulation.phases import Phases, transfer_link

    if not (hardware.prefill_workers > 0 and hardware.decode_workers > 0):
        raise InputError(
            f"{hardware.prefill_workers} prefill and {hardware.decode_workers} decode workers: the one kind answers nothing without the other",
            "give at least 1 of each",
            field="decode_workers" if hardware.prefill_workers > 0 else "prefill_workers",
        )
    if hardware.replicas > 1:
        raise InputError(
            f"{hardware.replicas} replicas and prefill and decode workers are both asked for",
            "give replicas, or prefill_workers and decode_workers",
            field="replicas",
        )
    place, first = scenario.deployment.cluster, scenario.deployment
    degrees = (hardware.decode_tensor_parallel or hardware.tensor_parallel, hardware.decode_pipeline_parallel or hardware.pipeline_parallel)
    second = dataclasses.replace(first, layout=Layout(tensor_parallel=degrees[0], pipeline_parallel=degrees[1]))
    batches = None if hardware.pipeline_batches is None else min(hardware.pipeline_batches, degrees[1])
    decode = _engines(
        second, scenario.config, dataclasses.replace(hardware, pipeline_batches=batches), scenario.fast_forward, scenario.acceptance
    )
    wanted = hardware.prefill_workers * first.layout.devices + hardware.decode_workers * second.layout.devices
    if wanted > place.devices:
        raise InputError(
            f"{hardware.prefill_workers} prefill and {hardware.decode_workers} decode workers take {wanted} devices, and {place.name} has {place.devices}",
            f"name a larger cluster, such as --cluster {place.device.name}x{wanted} or dgx-h100:{-(-wanted // 8)}",
            field="cluster",
        )
    near = hardware.kv_link == "fabric" or (hardware.kv_link is None and wanted <= place.domain)
    if hardware.kv_link in (None, "fabric", "network"):
        link = transfer_link(place, first, second, near=near)
    else:
        link = catalogue.default().link(hardware.kv_link)
    return Phases(scenario, decode, link).times(hardware.prefill_workers, hardware.decode_workers)
