"""`plan.toml`: what was chosen, what it is predicted to do, where that comes from; and what of it can be executed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import Field, field_validator

from armillary import __version__
from armillary.core.config import Config, load_toml, resolve, to_toml
from armillary.core.errors import FormatError, InputError
from armillary.core.units import MS
from armillary.plan.capacity import Probe
from armillary.plan.demand import Demand
from armillary.plan.objective import Objective, parse
from armillary.plan.search import Found, Option
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.scenario import MOST_REPLICAS, Scenario

SCHEMA: Final = 1


class Hardware(Config):
    """What one replica runs on."""

    cluster: str
    """As `--cluster` is written."""
    device: str
    kind: str
    """gpu, tpu or cpu."""
    devices: int = Field(ge=1)
    tensor_parallel: int = Field(ge=1)
    pipeline_parallel: int = Field(ge=1)
    weights: str
    """The format of the weights in memory."""
    dollars_per_hour: float | None = None


class Workload(Config):
    """What it was planned for."""

    lengths: str
    variation: float = Field(gt=0)
    """Coefficient of variation of the time between arrivals."""
    rate: float = Field(gt=0)
    """Requests a second, over all replicas."""
    slo: str
    """The objective, as `--slo` is written."""
    acceptance: str | None = None
    """How often drafts are right, as `--acceptance` is written."""

    @field_validator("slo")
    @classmethod
    def _readable(cls, text: str) -> str:
        parse(text)
        return text


class Predicted(Config):
    """What the simulation of all replicas says of the later half of its requests; `p` is the objective's own percentile."""

    capacity_per_replica: float = Field(ge=0)
    """Requests a second at which one replica alone just keeps the objective."""
    attainment: float = Field(ge=0, le=1)
    ttft_ms_p50: float
    ttft_ms_p: float
    tpot_ms_p50: float
    tpot_ms_p: float
    wait_ms_p50: float
    wait_ms_p: float
    requests: int
    """Simulated at the wanted rate."""
    dollars_per_hour: float | None = None
    """Of all replicas."""
    dollars_per_million_tokens: float | None = None
    """Generated tokens, at the wanted rate."""


class Provenance(Config):
    """How it was found."""

    armillary: str
    cost_model: str
    seed: int
    tolerance: float
    """The relative error of capacities, of sampling apart."""
    candidates: int
    rank: str


class Plan(Config):
    """A plan file."""

    schema_version: int = SCHEMA
    model: str
    replicas: int = Field(ge=1, le=MOST_REPLICAS)
    router: str
    hardware: Hardware
    workload: Workload
    predicted: Predicted
    provenance: Provenance
    engine: EngineConfig
    """The options of `serve`."""

    @field_validator("schema_version")
    @classmethod
    def _known(cls, version: int) -> int:
        if version != SCHEMA:
            raise InputError(
                f"the plan has schema_version {version}, and this Armillary reads {SCHEMA}", "plan again", field="schema_version"
            )
        return version

    def save(self, path: str | Path) -> None:
        """As TOML."""
        Path(path).write_text(to_toml(self), encoding="utf-8")


def load(path: str | Path) -> Plan:
    """A plan file. Raises NotFoundError, FormatError, or InputError naming the key."""
    if "schema_version" not in load_toml(path):
        raise FormatError(f"{path} is no plan: it has no schema_version", "write one with `armillary plan serve MODEL --output plan.toml`")
    return resolve(Plan, file=path, environment={}).value


def chosen(
    model: str, option: Option, found: Found, demand: Demand, objective: Objective, rate: float, scenario: Scenario, seen: Probe, size: int
) -> Plan:
    """The plan of an option of a search over `size` candidates, of which `scenario` are the replicas and `seen` what they do together."""
    candidate, layout = option.candidate, option.candidate.deployment.layout
    hourly = None if candidate.price is None else candidate.price * scenario.replicas
    cost = scenario.cost
    return Plan(
        model=model,
        replicas=scenario.replicas,
        router=scenario.router,
        hardware=Hardware(
            cluster=candidate.spelling,
            device=candidate.deployment.device.name,
            kind=candidate.deployment.device.kind,
            devices=candidate.devices,
            tensor_parallel=layout.tensor_parallel,
            pipeline_parallel=layout.pipeline_parallel,
            weights=candidate.deployment.precision.weights,
            dollars_per_hour=candidate.price,
        ),
        workload=Workload(
            lengths=demand.lengths.name,
            variation=demand.variation,
            rate=rate,
            slo=objective.text,
            acceptance=None if scenario.acceptance is None else str(scenario.acceptance),
        ),
        predicted=Predicted(
            capacity_per_replica=option.capacity.rate,
            attainment=seen.attainment,
            ttft_ms_p50=seen.first_token[0] / MS,
            ttft_ms_p=seen.first_token[1] / MS,
            tpot_ms_p50=seen.per_token[0] / MS,
            tpot_ms_p=seen.per_token[1] / MS,
            wait_ms_p50=seen.wait[0] / MS,
            wait_ms_p=seen.wait[1] / MS,
            requests=seen.requests,
            dollars_per_hour=hourly,
            dollars_per_million_tokens=None if hourly is None else per_million(hourly, rate, found.moments.answer),
        ),
        provenance=Provenance(
            armillary=__version__,
            cost_model=cost.name if cost is not None else "roofline",
            seed=demand.seed,
            tolerance=found.tolerance,
            candidates=size,
            rank=found.rank,
        ),
        engine=scenario.settled,
    )


def per_million(hourly: float, rate: float, answer: float) -> float:
    """Dollars a million generated tokens, at `rate` requests a second whose answers have `answer` tokens on average."""
    return hourly / 3600 / (rate * answer) * 1e6


def executable(plan: Plan) -> dict[str, Any]:
    """What `serve` is told by a plan, by dotted keys of its configuration. Raises InputError for hardware that the engine does not run on."""
    hardware = plan.hardware
    if hardware.kind != "cpu":
        raise InputError(
            f"the plan is for {hardware.devices} x {hardware.device} a replica, and the engine computes on this machine's CPU",
            "plan for this machine: armillary calibrate --output profile.json, then armillary plan serve MODEL --cluster profile.json; "
            "or give the [engine] table of the plan to the engine that has the devices",
            field="plan",
        )
    if hardware.devices > 1:
        raise InputError(
            f"the plan splits a replica over {hardware.devices} devices, and here an engine is one process on one",
            "plan with --tp 1 --pp 1, and as many replicas as it takes",
            field="plan",
        )
    engine = {f"engine.{name}": getattr(plan.engine, name) for name in EngineConfig.model_fields}
    fleet = {"fleet.replicas": plan.replicas, "fleet.router": plan.router} if plan.replicas > 1 else {}
    told = {"model": plan.model, **fleet, **engine}
    return {key: value for key, value in told.items() if value is not None}
