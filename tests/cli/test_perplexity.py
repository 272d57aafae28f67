"""`armillary perplexity` measures formats on a text and refuses what it cannot before it loads anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

from armillary.cli.main import MISUSED


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("It is a truth universally acknowledged. " * 20, encoding="utf-8")
    return path


def test_fp32_is_the_base_and_lines_say_what_json_says(armillary: Command, tiny_model: Path, text: Path) -> None:
    arguments = ("perplexity", tiny_model, "--quantize", "none", "--corpus", text, "--tokens", 500, "--context", 100)
    found = json.loads(armillary(*arguments, "--json").stdout)
    (row,) = found["rows"]
    assert (found["windows"], found["context"], row["weights"], row["over_fp32"]) == (5, 100, "none", 0.0)
    assert row["perplexity"] > 1
    lines = armillary(*arguments).stdout
    assert "5 windows of 100 tokens" in lines
    assert f"{row['perplexity']:.3f} ± {row['standard_error']:.3f}" in lines


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quantize", "none,int3"), "int3"),
        (("--context", "4096", "--tokens", "100"), "less than one window"),
        (("--corpus", "sootu"), "did you mean sotu?"),
        (("--threads", "0"), "threads"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is_loaded(
    armillary: Command, tiny_model: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = armillary("perplexity", tiny_model, *arguments)
    assert ran.returncode == MISUSED
    assert said in ran.stderr
    assert "scoring" not in ran.stderr
    assert "defect" not in ran.stderr


def test_a_text_without_one_window_or_that_is_no_text_is_refused(armillary: Command, tiny_model: Path, text: Path, tmp_path: Path) -> None:
    ran = armillary("perplexity", tiny_model, "--corpus", text, "--context", 1500)
    assert ran.returncode == MISUSED
    assert "less than one window" in ran.stderr
    (tmp_path / "binary").write_bytes(b"abc\xff")
    ran = armillary("perplexity", tiny_model, "--corpus", tmp_path / "binary")
    assert "is not UTF-8 (byte 3)" in ran.stderr
