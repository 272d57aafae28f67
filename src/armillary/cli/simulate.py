"""`armillary simulate`: what a configuration would do on hardware that is not here, by the very engine in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, Json, PublishedModel
from armillary.cli.simulate_scenario import Hardware, simulated_of
from armillary.cli.workload import Coming, Workload

simulate = App(name="simulate")
simulate.command(
    "armillary.cli.simulate_capacity:capacity", name="capacity", help="The highest rate at which an objective holds, and the curve to it."
)
simulate.command("armillary.cli.simulate_page:page", name="page", help="The page's tab for virtual time, without a model to serve.")
simulate.command("armillary.cli.simulate_watch:watch", name="watch", help="For the page: the engine at any instant, by lines of JSON.")


@simulate.command(name="serve")
def serve(
    model: PublishedModel,
    /,
    *,
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    workload: Workload = Workload(),  # noqa: B008
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    config: ConfigFile = None,
    slo: Annotated[str | None, Parameter(help="Tell which share of the requests keeps it: ttft=300ms,tpot=50ms,wait=5s.")] = None,
    save: Annotated[Path | None, Parameter(help="Write the trace of the (one) replica: Chrome/Perfetto JSON.")] = None,
    step_all: Annotated[
        bool, Parameter(name="--step-all", negative=(), help="Step through iterations that repeat instead of leaping over them.")
    ] = False,
    json: Json = False,
) -> None:
    """Serve a workload in virtual time: the scheduler, memory and router are those of `armillary serve`, durations a roofline's or measured."""
    from armillary.cli.plan_files import checked_folder
    from armillary.cli.simulate_told import facts, tell
    from armillary.cli.terminal import print_json, timed
    from armillary.core.errors import InputError
    from armillary.core.trace import Trace
    from armillary.core.units import format_duration
    from armillary.plan.objective import parse
    from armillary.serve.simulation.scenario import Scenario

    checked_folder(save)
    objective = parse(slo) if slo is not None else None
    simulated = simulated_of(model, hardware, workload, engine, config, fast=not step_all)
    coming = Coming(workload, simulated)
    if save is not None and not isinstance(simulated, Scenario):
        raise InputError(
            "a trace of several engines would mix their iterations", "trace one replica, without --prefill-workers", field="save"
        )
    trace = Trace(f"{model}, virtual time") if save is not None else None
    with timed("requests in virtual time") as close:
        run = simulated.run(coming.source, trace=trace) if isinstance(simulated, Scenario) else simulated.run(coming.source)
        close(
            f"{format_duration(run.result.makespan)} of virtual time, {len(run.result.arrival) / max(run.wall, 1e-9):,.0f} requests a second"
        )
    if save is not None and trace is not None:
        trace.save(save)
    if json:
        print_json(facts(simulated, run, coming, objective))
        return
    tell(simulated, run, coming, objective)
