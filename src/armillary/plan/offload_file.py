"""The plan file of offloading: where a model's bytes go, what that is predicted to cost, and what `serve` is told where the hardware is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from armillary import __version__
from armillary.core.config import Config, load_toml, resolve
from armillary.core.errors import InputError
from armillary.plan.file import PlanFile
from armillary.plan.offload import BLOCK_SIZE, Found
from armillary.serve.config import EngineConfig


class Accelerator(Config):
    """What the model runs on, sizes in bytes."""

    cluster: str
    device: str
    kind: str
    memory: int = Field(ge=0)
    ram: int = Field(ge=0)
    disk: int = Field(ge=0)


class Sequences(Config):
    """What it was planned for: a block passes each layer in `batches` batches."""

    prompt: int = Field(ge=1)
    answer: int = Field(ge=1)
    block: int = Field(ge=1)
    batches: int = Field(ge=1)


class Costs(Config):
    """By the cost model: seconds of a layer in prefill and for a token of every sequence, of the block, and tokens a second."""

    prefill_layer: float
    token_layer: float
    block_seconds: float
    tokens_per_second: float


class OffloadPlan(PlanFile):
    """An offloading plan's file."""

    plan: Literal["offload"] = "offload"
    model: str
    hardware: Accelerator
    workload: Sequences
    predicted: Costs
    armillary: str = __version__
    cost_model: str
    engine: EngineConfig
    """The options of `serve`."""


def is_one(path: str | Path) -> bool:
    """Whether a plan file is of offloading."""
    return load_toml(path).get("plan") == "offload"


def load(path: str | Path) -> OffloadPlan:
    """A plan file. Raises NotFoundError, FormatError, or InputError naming the key."""
    return resolve(OffloadPlan, file=path, environment={}).value


def written(model: str, cluster: str, found: Found) -> OffloadPlan:
    """The file of a search's result."""
    place, work, price = found.place, found.best.work, found.price
    context = work.prompt + work.answer
    options = {
        "offload": told(found),
        "offload_memory": place.arena,
        "offload_compress": "int4" if work.compressed else "none",
        "max_running": work.block,
        "max_batch_tokens": work.block * work.prompt,
        "block_size": BLOCK_SIZE,
        "kv_blocks": work.block * -(-context // BLOCK_SIZE),
        "context": context,
    }
    return OffloadPlan(
        model=model,
        hardware=Accelerator(
            cluster=cluster, device=place.device.name, kind=place.device.kind, memory=place.arena, ram=place.ram, disk=place.disk
        ),
        workload=Sequences(prompt=work.prompt, answer=work.answer, block=work.block, batches=found.policy.batches),
        predicted=Costs(
            prefill_layer=price.prefill, token_layer=price.generation, block_seconds=price.total, tokens_per_second=price.throughput
        ),
        cost_model=place.source,
        engine=EngineConfig.model_validate(options),
    )


def told(found: Found) -> str:
    """The policy as `--offload` is written."""
    policy = found.policy
    return f"weights={policy.weights},cache={policy.cache},hidden={policy.hidden},batches={policy.batches}"


def executable(plan: OffloadPlan) -> dict[str, Any]:
    """What `serve` is told, by dotted keys of its configuration. Raises InputError for hardware that the engine does not run on."""
    if plan.hardware.kind != "cpu":
        raise InputError(
            f"the plan is for a {plan.hardware.device}, and the engine computes on this machine's CPU",
            "plan for this machine: armillary calibrate --output profile.json, then armillary plan offload MODEL --cluster profile.json --accelerator-memory 2GB",
            field="plan",
        )
    engine = {f"engine.{name}": getattr(plan.engine, name) for name in EngineConfig.model_fields}
    return {key: value for key, value in ({"model": plan.model} | engine).items() if value is not None}
