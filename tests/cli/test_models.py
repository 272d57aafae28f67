"""`armillary models` says what is here and what a model is, in lines and as JSON alike."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Command

from armillary.models.hf import load_hf


def test_an_empty_cache_is_said_with_the_command_that_fills_it(armillary: Command, tmp_path: Path) -> None:
    ran = armillary("models", ARMILLARY_HOME=str(tmp_path))
    assert "no: armillary models pull smollm2" in ran.stdout
    found = json.loads(armillary("models", "list", "--json", ARMILLARY_HOME=str(tmp_path)).stdout)
    assert [(model["name"], model["cached"], model["path"]) for model in found] == [("smollm2", False, None), ("minilm", False, None)]


def test_show_counts_what_the_model_has(armillary: Command, tiny_model: Path) -> None:
    facts = json.loads(armillary("models", "show", tiny_model, "--json").stdout)
    decoder = load_hf(tiny_model)
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    assert facts["parameters"] == parameters
    assert facts["weight_bytes"] == 4 * parameters
    assert facts["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert facts["kv_bytes_per_full_context"] == 2048 * facts["kv_bytes_per_token"]


def test_show_in_lines_says_the_same(armillary: Command, tiny_model: Path) -> None:
    facts = json.loads(armillary("models", "show", tiny_model, "--json").stdout)
    lines = armillary("models", "show", tiny_model).stdout
    assert lines.splitlines()[0] == facts["description"]
    assert f"{facts['parameters']:,}" in lines
    assert "stops at '<|im_end|>'" in lines


def test_a_folder_without_a_model_is_refused(armillary: Command, tmp_path: Path) -> None:
    ran = armillary("models", "show", tmp_path)
    assert ran.returncode == 2
    assert str(tmp_path) in ran.stderr


def test_kept_weights_are_listed_and_removed(armillary: Command, tmp_path: Path) -> None:
    assert json.loads(armillary("models", "cache", "--json", ARMILLARY_HOME=str(tmp_path)).stdout) == []
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "m-int4-0123.armpack").write_bytes(bytes(2_000))
    (file,) = json.loads(armillary("models", "cache", "--json", ARMILLARY_HOME=str(tmp_path)).stdout)
    assert file["bytes"] == 2_000
    assert "m-int4-0123.armpack" in armillary("models", "cache", ARMILLARY_HOME=str(tmp_path)).stdout
    assert "removed 2" in armillary("models", "cache", "--clear", ARMILLARY_HOME=str(tmp_path)).stdout
    assert list((tmp_path / "weights").iterdir()) == []
