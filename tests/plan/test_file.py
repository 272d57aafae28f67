"""A plan is read back as it was written, is executed where its hardware is, and says so where it is not."""

import pytest

from armillary.cli.serve import planned
from armillary.cli.settings import EngineFlags, settle
from armillary.core.errors import ArmillaryError, FormatError, InputError
from armillary.models.graph.find import find
from armillary.plan.arithmetic import arithmetic
from armillary.plan.candidates import Space, candidates
from armillary.plan.choice import choose
from armillary.plan.demand import Demand
from armillary.plan.file import chosen, load
from armillary.plan.objective import parse
from armillary.plan.search import search
from armillary.serve.config import EngineConfig
from armillary.serve.workload import fixed

DEMAND, OBJECTIVE = Demand(fixed(100, 4)), parse("ttft=200ms,tpot=100ms")


@pytest.fixture(scope="module")
def plans():
    """Of a processor and of a GPU, with the search's result for the second."""
    made = []
    for model, device, rate, weights in (("smollm2-135m", "epyc-7742", 3.0, "none"), ("llama-2-7b", "h100", 20.0, "fp16")):
        space = Space((device,), (1,), (1,), ("sarathi",), (256,), (8,), (weights,))
        tried = candidates(find(model), space, EngineConfig(kv_dtype="fp16", kv_blocks=2000, max_queue=100_000))
        found = search(tried, DEMAND, OBJECTIVE, rate=rate, rank="devices", tolerance=0.2)
        best, found = choose(found, DEMAND, OBJECTIVE, rate, "power-of-two")
        made.append((chosen(model, best, found, DEMAND, OBJECTIVE, rate, "power-of-two", space.size), found))
    return made


def test_a_plan_is_read_back_as_it_was_written(plans, tmp_path):
    for plan, _ in plans:
        plan.save(tmp_path / "plan.toml")
        assert load(tmp_path / "plan.toml") == plan


def test_serve_takes_engine_and_replicas_and_flags_win(plans, tmp_path):
    plan = plans[0][0].model_copy(update={"replicas": 3})
    plan.save(tmp_path / "plan.toml")
    told = planned(tmp_path / "plan.toml")
    settled = settle(defaults=told, engine=EngineFlags(max_running=3)).value
    assert (settled.model, settled.fleet.replicas, settled.fleet.router) == ("smollm2-135m", 3, "power-of-two")
    blocks = 3 * plan.engine.kv_blocks  # serve divides what it is given
    assert settled.engine == plan.engine.model_copy(update={"max_running": 3, "kv_blocks": blocks})
    plans[0][0].model_copy(update={"replicas": 1}).save(tmp_path / "plan.toml")
    assert settle(defaults=planned(tmp_path / "plan.toml")).value.fleet.alone  # whom one replica leaves nothing to choose


def test_hardware_that_is_not_here_is_named(plans, tmp_path):
    plan = plans[1][0]
    plan.save(tmp_path / "plan.toml")
    with pytest.raises(InputError, match=r"1 x h100-\S+ a replica.*plan for this machine: armillary calibrate"):
        planned(tmp_path / "plan.toml")
    split = plans[0][0].model_copy(update={"hardware": plans[0][0].hardware.model_copy(update={"devices": 2})})
    split.save(tmp_path / "plan.toml")
    with pytest.raises(InputError, match="over 2 devices"):
        planned(tmp_path / "plan.toml")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("schema_version = 1", "schema_version = 2"), "schema_version 2"), (("schema_version = 1\n", ""), "is no plan"),
        (("replicas = ", "replica = "), "did you mean 'replicas'"), (("slo = ", "slo = 'x' #"), "no part of an objective"),
        (('policy = "sarathi"', 'policy = "luck"'), "luck"),
    ],
)  # fmt: skip
def test_damaged_plans_name_the_key(plans, tmp_path, change, says):
    path = tmp_path / "plan.toml"
    plans[0][0].save(path)
    path.write_text(path.read_text().replace(*change, 1))
    with pytest.raises(ArmillaryError, match=says):
        load(path)
    path.write_text("not toml")
    with pytest.raises(FormatError):
        load(path)


def test_the_arithmetic_adds_up(plans):
    plan, found = plans[1]
    option = found.options[0]
    lines = dict(arithmetic(option, found.moments, found.rate))
    config = option.candidate.scenario.settled
    assert f"{config.kv_blocks:,} blocks x {config.block_size} = {config.kv_blocks * config.block_size:,}" in lines["memory of a device"]
    assert f"ceil(20 / {option.capacity.rate:.4g}) = {option.replicas(20.0)}" in lines["replicas"]
    assert plan.predicted.dollars_per_million_tokens == pytest.approx(plan.predicted.dollars_per_hour / 3600 / (20 * 4) * 1e6)
