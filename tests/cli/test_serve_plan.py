"""What is planned for this machine is what serves on it: calibrate's profile, plan, serve."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from test_serve import ask, serving

from armillary.cli.main import TERMINATED, run
from armillary.cli.serve import planned
from armillary.plan.file import load

SMALL = [
    "--tp",
    "1",
    "--pp",
    "1",
    "--budgets",
    "512",
    "--running",
    "8",
    "--lengths",
    "100+5",
    "--keep",
    "1",
    "--rank",
    "devices",
    "--tolerance",
    "0.9",
]
ASKED = ["--slo", "ttft=50ms,tpot=20ms", "--context", "256"]


def test_prefill_and_decode_workers_start_from_a_plan_and_answer(tiny_model: Path, measured_profile: Path, tmp_path: Path) -> None:
    file, halves = tmp_path / "plan.toml", f"2x{measured_profile}"
    plan = ["plan", "serve", str(tiny_model), "--cluster", halves, "--rate", "5", "--disaggregate", "always", *ASKED, *SMALL]
    assert run([*plan, "--output", str(file)]) == 0
    apart = load(file).disaggregation
    assert apart is not None
    assert (apart.prefill.count, apart.decode.count, apart.link) == (1, 1, "shared-memory")
    with serving("serve", "--plan", file, "--port", "0") as (process, url):
        name = json.loads(ask(f"{url}/v1/models")[1])["data"][0]["id"]
        body = {"model": name, "prompt": "what was planned", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
        status, text = ask(f"{url}/v1/completions", body)
        assert status == 200
        assert json.loads(text)["usage"]["completion_tokens"] == 6
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == TERMINATED
    assert "planned for 1 prefill and 1 decode workers" in errors
    blocks = load(file).engine.kv_blocks
    assert f"{blocks:,} blocks of 16 tokens" in errors  # each has the pool that it was planned with
    assert "WARNING" not in errors


def test_more_machines_than_this_one_are_told_of(
    tiny_model: Path, measured_profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.toml"
    plan = ["plan", "serve", str(tiny_model), "--cluster", str(measured_profile), "--rate", "5", "--disaggregate", "never", *ASKED, *SMALL]
    assert run([*plan, "--output", str(file)]) == 0
    for rented, warned in ((1, True), (2, False)):
        found = load(file)
        two = found.model_copy(update={"replicas": 2, "hardware": found.hardware.model_copy(update={"rented": rented})})
        two.save(tmp_path / "two.toml")
        capsys.readouterr()
        told = planned(tmp_path / "two.toml")
        assert told["fleet.replicas"] == 2
        assert two.engine.kv_blocks is not None
        assert told["engine.kv_blocks"] == 2 * two.engine.kv_blocks
        assert ("planned for 2 machines, and all 2 engines share this one" in capsys.readouterr().err) == warned


def test_one_engine_that_has_the_machine_is_planned_without_parts(
    tiny_model: Path, measured_profile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nobody is beside it to be a decode worker, which is no reason not to plan it."""
    file = tmp_path / "plan.toml"
    plan = ["plan", "serve", str(tiny_model), "--cluster", str(measured_profile), "--rate", "5", *ASKED, *SMALL]
    assert run([*plan, "--output", str(file)]) == 0
    assert load(file).disaggregation is None
    assert run([*plan, "--disaggregate", "always"]) != 0
    assert "one engine that has the whole machine" in capsys.readouterr().err
