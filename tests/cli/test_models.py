"""`armillary models` says what is here and what a model is, in lines and as JSON alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

from armillary.cli.model_operations import parse_batch, parse_layout
from armillary.core.errors import InputError
from armillary.models.config_file import read_config
from armillary.models.graph.layout import Layout
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


def test_operations_of_a_published_model_need_no_weights(armillary: Command) -> None:
    asked = ("models", "show", "llama-2-70b", "--batch", "512,64x1@1000", "--layout", "tp=8,pp=2,sp", "--kv", "fp8")
    found = json.loads(armillary(*asked, "--json").stdout)
    assert found["parameters"] == 68_976_648_192
    assert (found["devices"], found["kv_bytes_per_token_of_a_device"]) == (16, 327_680 // 2 // 16)
    first, last = found["stages"]
    qkv = next(operation for operation in first["operations"] if operation["name"] == "qkv")
    assert (qkv["m"], qkv["n"], qkv["k"], qkv["repeat"], qkv["flops"]) == (576, 1280, 8192, 40, 2 * 576 * 1280 * 8192)
    assert last["total"]["flops"] == sum(operation["flops"] * operation["repeat"] for operation in last["operations"])
    lines = armillary(*asked).stdout
    assert "stage 0, one repetition" in lines
    assert "576 x 1280 x 8192" in lines


def test_a_model_of_this_machine_has_operations_too(armillary: Command, tiny_model: Path) -> None:
    found = json.loads(armillary("models", "show", tiny_model, "--batch", "7", "--json").stdout)
    assert found["parameters"] == read_config(tiny_model).parameters()


def test_published_architectures_are_listed_with_their_sources(armillary: Command) -> None:
    lines = armillary("models", "published").stdout.splitlines()
    assert next(line.split()[:3] for line in lines if line.startswith("deepseek-v3")) == ["deepseek-v3", "671B", "36.6B"]
    assert "Touvron" in lines[7]


def test_a_batch_or_a_layout_that_cannot_be_is_refused(armillary: Command) -> None:
    assert parse_batch("512, 2x1@1000") == [(512, 0), (1, 1000), (1, 1000)]
    for wrong, said in (("x1", "COUNTx"), ("0x5", "has no sequence"), ("0", "COUNTx"), ("9999999x1", "up to 1,000,000")):
        with pytest.raises(InputError, match=said):
            parse_batch(wrong)
    assert parse_layout("tp=4, sp,pp=2") == Layout(4, 2, sequence_parallel=True)
    for wrong in ("tp=eight", "tp", "xp=2", "sp=1"):
        with pytest.raises(InputError, match="write tp=N"):
            parse_layout(wrong)
    ran = armillary("models", "show", "llama-2-70b", "--layout", "tp=3")
    assert (ran.returncode, "choose tensor_parallel from 1, 2, 4" in ran.stderr) == (2, True), ran.stderr
