"""`plan.toml`: what was chosen, what it is predicted to do, where that comes from; and what of it can be executed here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from pydantic import Field, field_validator

from armillary import __version__
from armillary.core.config import Config, load_toml, resolve, to_toml
from armillary.core.errors import FormatError, InputError
from armillary.core.units import MS
from armillary.plan.choice import Chosen
from armillary.plan.demand import Demand
from armillary.plan.disaggregation import Apart
from armillary.plan.objective import Objective, parse
from armillary.plan.search import Found, Option
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.scenario import MOST_REPLICAS, Scenario

SCHEMA: Final = 1


class Hardware(Config):
    """What one replica runs on, or one prefill and one decode instance."""

    cluster: str
    """As `--cluster` is written."""
    device: str
    kind: str
    """gpu, tpu or cpu."""
    devices: int = Field(ge=1)
    tensor_parallel: int | None = Field(None, ge=1)
    """Of a replica; instances have their own."""
    pipeline_parallel: int | None = Field(None, ge=1)
    weights: str
    """The format of the weights in memory."""
    rented: int = Field(1, ge=1)
    """Devices that are rented together: 1 of bare ones, all of a node or a rack that is named."""
    dollars_per_hour: float | None = None
    """Of what is rented together."""


class Instances(Config):
    """The engines of one phase."""

    count: int = Field(ge=1, le=MOST_REPLICAS)
    devices: int = Field(ge=1)
    """Of one."""
    tensor_parallel: int = Field(ge=1)
    pipeline_parallel: int = Field(ge=1)
    kv_blocks: int = Field(ge=1)
    """Of one; those of a prefill instance are also where keys and values wait to be pulled."""
    capacity: float = Field(ge=0)
    """Requests a second that one keeps its phase's bound of by itself, or at most keeps where that was not sought."""


class Disaggregation(Config):
    """Prompts and answers on instances of their own (DistServe)."""

    algorithm: int = Field(ge=1, le=2)
    """1: each phase is chosen and multiplied by itself; 2: pairs whose stages share nodes."""
    prefill: Instances
    decode: Instances
    link: str
    """What keys and values move over, from one instance to another."""
    link_bytes_per_second: float = Field(gt=0)
    bytes_per_token: int = Field(ge=1)
    """Of keys and values, for each token of a prompt."""
    bytes_per_second: float = Field(ge=0)
    """Moved in all at the wanted rate."""


class Workload(Config):
    """What it was planned for."""

    lengths: str
    variation: float = Field(ge=0)
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
    """Requests a second at which one replica alone just keeps the objective; of instances all of them by what each phase keeps alone."""
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
    """Of everything that is rented."""
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


class PlanFile(Config):
    """What all plans' files begin with."""

    schema_version: int = SCHEMA

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


class Plan(PlanFile):
    """A plan file."""

    model: str
    replicas: int = Field(ge=1, le=MOST_REPLICAS)
    """Engines that do everything; 1 where there is a [disaggregation]."""
    router: str
    hardware: Hardware
    disaggregation: Disaggregation | None = None
    workload: Workload
    predicted: Predicted
    provenance: Provenance
    engine: EngineConfig
    """The options of `serve`."""


def load(path: str | Path) -> Plan:
    """A plan file. Raises NotFoundError, FormatError, or InputError naming the key."""
    if "schema_version" not in load_toml(path):
        raise FormatError(f"{path} is no plan: it has no schema_version", "write one with `armillary plan serve MODEL --output plan.toml`")
    return resolve(Plan, file=path, environment={}).value


def chosen(model: str, choice: Chosen, found: Found, demand: Demand, objective: Objective, rate: float, router: str, size: int) -> Plan:
    """The plan of what a search over `size` candidates chose."""
    option, seen = choice.option, choice.seen
    first = option.candidate if isinstance(option, Option) else option.prefill.candidate
    sizes = [devices for _, devices in option.groups((1,) * len(choice.counts))]
    hourly = first.rent.cost(*option.groups(choice.counts))
    layout = first.deployment.layout if isinstance(option, Option) else None
    apart = None if isinstance(option, Option) else _apart(option, choice, found, rate)
    engine = choice.simulated.settled if isinstance(choice.simulated, Scenario) else choice.simulated.decode.settled
    return Plan(
        model=model,
        replicas=1 if apart is not None else choice.counts[0],
        router="shortest-queue" if apart is not None else router,
        hardware=Hardware(
            cluster=first.spelling if apart is None else first.cluster,
            device=first.deployment.device.name,
            kind=first.deployment.device.kind,
            devices=sum(sizes) * (option.nodes if isinstance(option, Apart) else 1),
            tensor_parallel=None if layout is None else layout.tensor_parallel,
            pipeline_parallel=None if layout is None else layout.pipeline_parallel,
            weights=first.deployment.precision.weights,
            rented=first.rent.devices,
            dollars_per_hour=first.rent.price,
        ),
        disaggregation=apart,
        workload=Workload(
            lengths=demand.lengths.name,
            variation=demand.variation,
            rate=rate,
            slo=objective.text,
            acceptance=None if first.scenario.acceptance is None else str(first.scenario.acceptance),
        ),
        predicted=Predicted(
            capacity_per_replica=sustained(option, choice.counts),
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
            cost_model=first.scenario.priced.name,
            seed=demand.seed,
            tolerance=found.tolerance,
            candidates=size,
            rank=found.rank,
        ),
        engine=engine,
    )


def sustained(option: Option | Apart, counts: tuple[int, ...]) -> float:
    """Requests a second: of a replica; of so many instances, by what each phase keeps alone, or each pair."""
    if isinstance(option, Option):
        return option.capacity.rate
    if option.pair is not None:
        return counts[0] * option.pair
    return min(counts[0] * option.prefill.rate, counts[1] * option.decode.rate)


def _apart(option: Apart, choice: Chosen, found: Found, rate: float) -> Disaggregation:
    phases = option.phases
    told = []
    for count, one, scenario in zip(choice.counts, (option.prefill, option.decode), (phases.prefill, phases.decode), strict=True):
        layout, blocks = one.candidate.deployment.layout, scenario.settled.kv_blocks
        assert blocks is not None
        told.append(
            Instances(
                count=count,
                devices=layout.devices,
                tensor_parallel=layout.tensor_parallel,
                pipeline_parallel=layout.pipeline_parallel,
                kv_blocks=blocks,
                capacity=one.rate,
            )
        )
    return Disaggregation(
        algorithm=option.algorithm,
        prefill=told[0],
        decode=told[1],
        link=option.link.name,
        link_bytes_per_second=option.link.bandwidth,
        bytes_per_token=phases.token_bytes,
        bytes_per_second=rate * found.moments.prompt * phases.token_bytes,
    )


def per_million(hourly: float, rate: float, answer: float) -> float:
    """Dollars a million generated tokens, at `rate` requests a second whose answers have `answer` tokens on average."""
    return hourly / 3600 / (rate * answer) * 1e6


def executable(plan: Plan) -> dict[str, Any]:
    """What `serve` is told by a plan, by dotted keys of its configuration. Raises InputError for hardware that the engine does not run on."""
    hardware, apart = plan.hardware, plan.disaggregation
    what = "a replica" if apart is None else "a pair of instances"
    if hardware.kind != "cpu":
        raise InputError(
            f"the plan is for {hardware.devices} x {hardware.device} {what}, and the engine computes on this machine's CPU",
            "plan for this machine: armillary calibrate --output profile.json, then armillary plan serve MODEL --cluster profile.json; "
            "or give the [engine] table of the plan to the engine that has the devices",
            field="plan",
        )
    devices = hardware.devices if apart is None else max(apart.prefill.devices, apart.decode.devices)
    if devices > 1:
        raise InputError(
            f"the plan splits {'a replica' if apart is None else 'an instance'} over {devices} devices, and here an engine is one process on one",
            "plan with --tp 1 --pp 1, and as many replicas as it takes",
            field="plan",
        )
    engine = {f"engine.{name}": getattr(plan.engine, name) for name in EngineConfig.model_fields}
    fleet: dict[str, Any] = {}
    if apart is not None:
        fleet = {"fleet.prefill_workers": apart.prefill.count, "fleet.decode_workers": apart.decode.count, "fleet.router": plan.router}
    elif plan.replicas > 1:
        fleet = {"fleet.replicas": plan.replicas, "fleet.router": plan.router}
    if fleet and plan.engine.kv_blocks is not None:
        engine["engine.kv_blocks"] = plan.engine.kv_blocks * engines(plan)  # serve has one pool, which it divides
    told = {"model": plan.model, **fleet, **engine}
    return {key: value for key, value in told.items() if value is not None}


def engines(plan: Plan) -> int:
    """How many there are."""
    apart = plan.disaggregation
    return plan.replicas if apart is None else apart.prefill.count + apart.decode.count


def machines(plan: Plan) -> int:
    """How many times what is rented together is taken, where an engine is one device."""
    return -(-engines(plan) // plan.hardware.rented)
