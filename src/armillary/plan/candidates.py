"""What could serve the model: devices x degrees of parallelism x formats x scheduling, and why some cannot."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from armillary.cluster import profile as profiles
from armillary.cluster.cluster import cluster
from armillary.core.config import resolve
from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.models.config import ModelConfig
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout, check
from armillary.models.graph.precision import Precision
from armillary.plan.rent import Rent, rent
from armillary.serve.calibration import cost_model
from armillary.serve.config import EngineConfig
from armillary.serve.simulation.acceptance import Acceptance
from armillary.serve.simulation.drafts import draft_of
from armillary.serve.simulation.kept import attending
from armillary.serve.simulation.measured import as_measured
from armillary.serve.simulation.memory import pool
from armillary.serve.simulation.scenario import Scenario
from armillary.sim.costs import CostModel, Fitted
from armillary.sim.costs.overlapped import priced

MOST: Final = 4096
"""Candidates of one search."""
_STAGES: Final = (1, 2, 4, 8)
REASONS: Final = {
    "layout": "cannot be laid out so",
    "memory": "does not fit",
    "format": "the catalogue lacks a figure that its cost needs",
    "price": "no price is known",
    "alone": "over the objective for a request alone",
    "ceiling": "worse than the best even at the roofline's ceiling",
    "beaten": "worse than the best, simulated at the rate that it would need",
    "objective": "holds the objective at no rate",
    "together": "does not keep the objective with all its engines together",
    "phases": "prompts and answers cannot be apart",
}


@dataclass(frozen=True, slots=True)
class Pruned:
    """Why `count` candidates like `name` were not pursued: `reason` is one of REASONS, `detail` has the numbers."""

    name: str
    reason: str
    detail: str
    fix: str = ""
    count: int = 1


@dataclass(frozen=True, slots=True)
class Space:
    """What is tried. A cluster of one bare device (`h100`) stands for as many of them in a node as a layout needs; others for what they say."""

    clusters: tuple[str, ...]
    tensor: tuple[int, ...] = (1, 2, 4, 8)
    pipeline: tuple[int, ...] = (1, 2)
    policies: tuple[str, ...] = ("sarathi", "vllm")
    budgets: tuple[int, ...] = (512, 2048)
    running: tuple[int, ...] = (64, 256)
    weights: tuple[str, ...] = ("fp16",)

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            values = getattr(self, name)
            if not values:
                raise InputError(f"the search has no {name} to try", f"give at least one of {name}", field=name)
            if len(set(values)) < len(values):
                raise InputError(f"the search tries {name} {', '.join(map(str, values))}", "name each once", field=name)
        if self.size > MOST:
            raise InputError(
                f"{self.size:,} candidates are asked for", f"at most {MOST:,}: give fewer budgets, policies or degrees", field="plan"
            )

    @property
    def size(self) -> int:
        """Combinations, the impossible ones included."""
        size = 1
        for name in self.__dataclass_fields__:
            size *= len(getattr(self, name))
        return size

    @property
    def schedulings(self) -> int:
        """Candidates a deployment."""
        return len(self.policies) * len(self.budgets) * len(self.running)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One replica: `cluster` is the hardware as it was asked for, `spelling` as much of it as a replica needs, `rent` how it is had."""

    cluster: str
    spelling: str
    scenario: Scenario
    rent: Rent

    @property
    def deployment(self) -> Deployment:
        return self.scenario.deployment

    @property
    def devices(self) -> int:
        """Devices a replica."""
        return self.deployment.layout.devices

    @property
    def price(self) -> float | None:
        """$/hour of a replica where what is rented is as full of such as it can be."""
        return self.rent.share(self.devices)

    @property
    def place(self) -> str:
        """Hardware, layout and format in words."""
        layout, whole = self.deployment.layout, f" in {self.deployment.cluster.name}" if self.rent.devices > 1 else ""
        return f"{layout.devices} x {self.deployment.device.name}{whole} ({_degrees(layout)}, {self.deployment.precision.weights})"

    @property
    def name(self) -> str:
        config = self.scenario.config
        return f"{self.place}, {config.policy} {config.max_batch_tokens}/{config.max_running}"


def candidates(
    model: Architecture,
    space: Space,
    engine: EngineConfig,
    host: float = 0.0,
    here: ModelConfig | None = None,
    *,
    acceptance: Acceptance | None = None,
) -> Iterator[Candidate | Pruned]:
    """All of `space`, each engine like `engine` in what the space leaves open; `host` ns an iteration beside the device. Drafts, where `engine`
    speculates, are right as `acceptance` says.

    `here`: the model's configuration, where it can be run here. On a machine's profile (.json) the KV pool is what `serve` makes it, and where the
    engine was measured iterations take what was measured; of other formats they take a roofline's time, which is told in a warning.
    Raises NotFoundError or InputError for a cluster that there is not.
    """
    bases = [(text, cluster(text)) for text in space.clusters]
    for (text, base), stages, degree, weights in product(bases, space.pipeline, space.tensor, space.weights):
        layout = Layout(tensor_parallel=degree, pipeline_parallel=stages)
        name = f"{layout.devices} x {base.device.name} ({_degrees(layout)}, {weights})"
        try:
            check(model, layout)
            spelling = text if layout.devices <= base.devices or base.devices > 1 else f"{text}x{layout.devices}"
            place = base if spelling == text else cluster(spelling)
        except (InputError, NotFoundError) as error:
            yield Pruned(name, "layout", error.problem, error.fix, space.schedulings)
            continue
        precision = Precision.of(weights, engine.kv_dtype)
        try:
            deployment = attending(Deployment(model, place, layout, precision), engine)
            blocks = pool(deployment, engine, draft_of(deployment, engine))
            if blocks < stages:
                raise CapacityError(
                    f"beside its weights {blocks} KV blocks fit, less than one for each of {stages} batches in flight", "use more devices"
                )
        except CapacityError as error:
            yield Pruned(name, "memory", error.problem, error.fix, space.schedulings)
            continue
        except InputError as error:
            yield Pruned(name, "layout", error.problem, error.fix, space.schedulings)
            continue
        machine = profiles.spelled(text) if layout.devices == 1 and here is not None else None
        measured = None if machine is None or here is None else _measured(*machine, here, engine.model_copy(update={"quantize": weights}))
        if measured is not None and host:
            raise InputError(f"{text} has measured the engine with its host", "leave --host-us out", field="host_us")
        if measured is not None and (engine.speculate != "off" or engine.async_scheduling == "on"):
            what = "speculate" if engine.speculate != "off" else "async_scheduling"
            raise InputError(f"{text} has measured the engine without {what}", f"leave {what} off, or plan for a device", field=what)
        try:
            ahead = engine.async_scheduling == "on"
            cost: CostModel = priced(deployment.roofline, host, ahead=ahead) if measured is None else measured
        except InputError as error:
            yield Pruned(name, "format", error.problem, error.fix, space.schedulings)
            continue
        for policy, budget, running in product(space.policies, space.budgets, space.running):
            config = _engine(engine, policy, budget, running, weights)
            if machine is not None and here is not None:
                config = as_measured(config, here, measured, deployment.kv_memory)
            yield Candidate(text, spelling, Scenario(deployment, config, cost=cost, acceptance=acceptance), rent(base))


def in_fewest_stages(tried: Callable[[Space], Iterable[Candidate | Pruned]], space: Space) -> tuple[list[Candidate | Pruned], int]:
    """What is `tried` of `space` with the fewest pipeline stages, 1 to 8, with which anything is possible, behind what was not with fewer; and
    how many combinations these are."""
    found: list[Candidate | Pruned] = []
    size = 0
    for stages in _STAGES:
        some = replace(space, pipeline=(stages,))
        found += tried(some)
        size += some.size
        if any(isinstance(one, Candidate) for one in found):
            break
    return found, size


def _measured(path: Path, parts: int, here: ModelConfig, engine: EngineConfig) -> Fitted | None:
    """The costs of the engine in a profile, with the cores of one of so many parts of the machine; None where there are none."""
    known = profiles.load(path)
    if parts > 1:
        engine = engine.model_copy(update={"threads": max(1, int(known.machine.usable_cores) // parts)})
    try:
        return cost_model(known, here, engine)
    except NotFoundError as error:
        warnings.warn(f"{error.problem}: durations are a roofline's, which is optimistic ({error.fix})", stacklevel=2)
        return None


def _engine(engine: EngineConfig, policy: str, budget: int, running: int, weights: str) -> EngineConfig:
    """Checked again, for not every policy goes with every option."""
    chosen: dict[str, Any] = {"policy": policy, "max_batch_tokens": budget, "max_running": running, "quantize": weights}
    return resolve(EngineConfig, environment={}, flags={name: getattr(engine, name) for name in engine.model_fields_set} | chosen).value


def _degrees(layout: Layout) -> str:
    return f"tp {layout.tensor_parallel}" + (f", pp {layout.pipeline_parallel}" if layout.pipeline_parallel > 1 else "")
