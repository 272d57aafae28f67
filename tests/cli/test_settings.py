"""Flags mirror the configuration, and each value comes from the strongest source that gives it."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from armillary.cli.run_config import RunConfig, ServerConfig
from armillary.cli.settings import EngineFlags, FleetFlags, ServerFlags, save_config, settle
from armillary.core.config import resolve
from armillary.core.errors import FormatError, InputError
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.config import FleetConfig


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MODEL", "ENGINE__POLICY", "ENGINE__BLOCK_SIZE", "SERVER__API_KEY", "SERVER__PORT"):
        monkeypatch.delenv(f"ARMILLARY_{name}", raising=False)


def test_every_option_of_the_configuration_has_its_flag() -> None:
    assert {field.name for field in fields(EngineFlags)} == set(EngineConfig.model_fields)
    assert {field.name for field in fields(ServerFlags)} == set(ServerConfig.model_fields)
    assert {field.name for field in fields(FleetFlags)} == set(FleetConfig.model_fields)
    names = [field.name for flags in (EngineFlags, ServerFlags, FleetFlags) for field in fields(flags)]
    assert len(names) == len(set(names)), "a verb takes them all, so no flag may stand for two options"


def test_default_then_file_then_environment_then_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "a"\n[engine]\npolicy = "orca"\nblock_size = 4\nmax_running = 8\n', encoding="utf-8")
    monkeypatch.setenv("ARMILLARY_ENGINE__POLICY", "vllm")
    monkeypatch.setenv("ARMILLARY_ENGINE__BLOCK_SIZE", "32")
    settled = settle(None, EngineFlags(block_size=64), file=file)
    engine = settled.value.engine
    assert (settled.value.model, engine.policy, engine.block_size, engine.max_running, engine.seed) == ("a", "vllm", 64, 8, 0)
    assert settled.provenance["engine.policy"] == "environment ARMILLARY_ENGINE__POLICY"
    assert settled.provenance["engine.block_size"] == "flag"
    assert settled.provenance["engine.max_running"] == f"file {file}"
    assert settled.provenance["engine.seed"] == "default"


def test_a_verbs_own_default_loses_to_every_other_source(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"engine.policy": "orca", "engine.block_size": 4, "engine.max_running": 2}
    monkeypatch.setenv("ARMILLARY_ENGINE__POLICY", "vllm")
    settled = settle("m", EngineFlags(block_size=64), defaults=own)
    engine = settled.value.engine
    assert (engine.policy, engine.block_size, engine.max_running) == ("vllm", 64, 2)
    assert settled.provenance["engine.max_running"] == "default of this verb"
    assert settled.provenance["model"] == "flag"


def test_what_is_saved_settles_to_the_same_but_for_the_key(tmp_path: Path) -> None:
    settled = settle("m", EngineFlags(kv_memory="512 MiB", policy="orca"), ServerFlags(port=1234, api_key="secret-of-mine"))
    save_config(settled, tmp_path / "config.toml")
    text = (tmp_path / "config.toml").read_text(encoding="utf-8")
    assert "secret-of-mine" not in text
    again = resolve(RunConfig, file=tmp_path / "config.toml", environment={}).value
    server = settled.value.server.model_copy(update={"api_key": None})
    assert again == settled.value.model_copy(update={"server": server})


def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text("[engine]\npolcy = 'orca'\n", encoding="utf-8")
    with pytest.raises(InputError, match="did you mean 'policy'"):
        settle(file=file)
    file.write_text("engine = [", encoding="utf-8")
    with pytest.raises(FormatError, match="not TOML"):
        settle(file=file)
