"""`armillary simulate capacity`: the highest rate at which an objective holds for one configuration, and the curve that leads to it."""

from __future__ import annotations

import dataclasses
import json as encoding
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import WORKLOAD, Acceptance, ConfigFile, EngineFlags, Lengths, PublishedModel, Variation
from armillary.cli.simulate_scenario import Hardware, simulated_of
from armillary.cli.workload import Workload

if TYPE_CHECKING:
    from armillary.plan.capacity import Capacity, Probe

_COLUMNS = ("req/s", "keep it", "goodput", "TTFT p50", "p99", "TPOT p50", "p99", "requests", "")


@Parameter(name="*")
@dataclasses.dataclass(frozen=True, slots=True)
class Demanded:
    """What comes, at whatever rate."""

    lengths: Lengths = "conversation"
    variation: Variation = 1.0
    acceptance: Acceptance = None
    tolerance: Annotated[float, Parameter(group=WORKLOAD, help="Relative bracket of the capacity; a narrower one takes more requests.")] = (
        0.1
    )


def capacity(
    model: PublishedModel,
    /,
    *,
    slo: Annotated[str, Parameter(help="Bounds that a share of the requests must keep: ttft=300ms,tpot=50ms,wait=5s,attainment=0.9.")],
    hardware: Hardware = Hardware(),  # noqa: B008 (frozen)
    demand: Demanded = Demanded(),
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    config: ConfigFile = None,
    json: Annotated[
        bool,
        Parameter(name="--json", negative=(), show_default=False, help="JSON lines: every rate as it has been tried, then the capacity."),
    ] = False,
) -> None:
    """The highest rate at which an objective holds, by bisection over simulations: every rate that is tried is a point of the curve."""
    from armillary.plan.capacity import capacity as found_by
    from armillary.plan.demand import Demand
    from armillary.plan.objective import parse
    from armillary.serve.simulation.phases import Phases
    from armillary.serve.workload.lengths import named

    objective = parse(slo)
    simulated = simulated_of(model, hardware, Workload(acceptance=demand.acceptance), engine, config)
    first = simulated.prefill if isinstance(simulated, Phases) else simulated
    asked = Demand(named(demand.lengths), demand.variation, first.config.seed)

    def say(kind: str, what: dict[str, Any]) -> None:
        print(encoding.dumps({kind: what}), flush=True)

    def tried(probe: Probe) -> None:
        if json:
            say("probe", _point(probe))
        else:
            print(_line(probe), flush=True)

    if not json:
        print(f"{first.deployment.model.name} on {simulated.devices} x {first.deployment.device.name}, {objective}\n{_row(_COLUMNS)}")
    found = found_by(simulated, asked, objective, tolerance=demand.tolerance, tried=tried)
    if json:
        say("capacity", _facts(found, simulated.devices, first.deployment.device.price))
    else:
        _tell(found, simulated.devices, first.deployment.device.price)


def _point(probe: Probe) -> dict[str, Any]:
    """A rate that was tried; times in ns, `p` at the objective's share."""
    point = dataclasses.asdict(probe) | {"goodput": probe.rate * probe.attainment}
    for name in ("first_token", "per_token", "wait"):
        point[name] = dict(zip(("p50", "p", "p99"), point[name], strict=True))
    return point


def _facts(found: Capacity, devices: int, price: float | None) -> dict[str, Any]:
    at = found.at
    dollars = None if price is None or at is None or not at.throughput else price * devices / 3600 / at.throughput * 1e6
    return {
        "rate": found.rate, "per_device": found.rate / devices, "dollars_per_million_tokens": dollars, "alone": _point(found.alone),
    }  # fmt: skip


def _tell(found: Capacity, devices: int, price: float | None) -> None:
    if not found.rate:
        lowest = f", nor do {found.probes[-1].rate:.3g} a second" if found.probes else ""
        print(f"\nnothing holds: of requests one by one {found.alone.attainment:.1%} keep the objective{lowest}")
        print(_line(found.alone))
        return
    facts = _facts(found, devices, price)
    dollars = facts["dollars_per_million_tokens"]
    money = "" if dollars is None else f", ${dollars:,.2f} a million generated tokens"
    print(f"\ncapacity: {found.rate:.3g} requests a second, {facts['per_device']:.3g} a device{money}")


def _line(probe: Probe) -> str:
    first, later = probe.first_token, probe.per_token
    times = [f"{ns / 1e6:.{digits}f} ms" for ns, digits in ((first[0], 0), (first[2], 0), (later[0], 1), (later[2], 1))]
    rate = f"{probe.rate:.3g}" if probe.rate else "alone"
    return _row(
        (
            rate,
            f"{probe.attainment:.1%}",
            f"{probe.rate * probe.attainment:.3g}",
            *times,
            f"{probe.requests:,}",
            "" if probe.holds else "lost",
        )
    )


def _row(cells: tuple[str, ...]) -> str:
    return "".join(cell.ljust(11) for cell in cells).rstrip()
