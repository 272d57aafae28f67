"""`armillary data`: what is prepared is what is inspected; near duplicates are named by file and line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

LINES = [f"Document {n} says that the spheres turn {n * n} times around, and the stars keep their places." for n in range(20)]


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": line}) + "\n" for line in [*LINES, " "]))
    return path


def test_prepare_then_inspect(armillary: Command, texts: Path, tmp_path: Path) -> None:
    ran = armillary("data", "prepare", texts, "--field", "body", "--train-bpe", 300, "--out", tmp_path / "out", "--json")
    made = json.loads(ran.stdout)
    facts = json.loads(armillary("data", "inspect", tmp_path / "out", "--json").stdout)
    assert {name: facts[name]["tokens"] for name in facts} == {name: made[name]["tokens"] for name in ("train", "validation")}
    assert sum(facts[name]["documents"] for name in facts) == 20
    assert facts["train"]["tokenizer"] == made["tokenizer"]
    shown = armillary("data", "inspect", tmp_path / "out").stdout
    assert "every file's SHA-256 is right" in shown
    assert "train 0: Document " in shown
    assert made["empty"] == 1
    again = armillary("data", "prepare", texts, "--field", "body", "--tokenizer", tmp_path / "out" / "tokenizer", "--out", tmp_path / "two")
    assert f"tokenizer identity {made['tokenizer'][:12]}" in again.stdout


def test_a_damaged_folder_and_a_foreign_tokenizer_are_named(armillary: Command, texts: Path, tmp_path: Path) -> None:
    for name, size in (("a", 280), ("b", 300)):
        armillary("data", "prepare", texts, "--field", "body", "--train-bpe", size, "--out", tmp_path / name)
    (tmp_path / "a" / "tokenizer").rename(tmp_path / "old")
    (tmp_path / "b" / "tokenizer").rename(tmp_path / "a" / "tokenizer")
    ran = armillary("data", "inspect", tmp_path / "a")
    assert (ran.returncode, "was tokenized by another tokenizer" in ran.stderr) == (2, True)
    shard = tmp_path / "b" / "train" / "tokens-00000.bin"
    shard.write_bytes(bytes(shard.stat().st_size))
    ran = armillary("data", "inspect", tmp_path / "b")
    assert ran.returncode == 2
    assert "tokens-00000.bin is damaged" in ran.stderr


def test_dedup_names_file_and_line(armillary: Command, tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in [LINES[0], "Quite another matter it is.", LINES[0].upper()]))
    found = json.loads(armillary("data", "dedup", path, "--json").stdout)
    assert found["pairs"] == [{"first": "texts.jsonl line 1", "second": "texts.jsonl line 3", "similarity": 1.0}]
    assert found["removed"] == ["texts.jsonl line 3"]
    assert "1 near duplicates in 1 groups; 2 are left" in armillary("data", "dedup", path).stdout


def test_autotune_prints_the_table_and_writes_the_trace(armillary: Command, texts: Path, tmp_path: Path) -> None:
    armillary("data", "prepare", texts, "--field", "body", "--train-bpe", 280, "--out", tmp_path / "made")
    command = ("data", "autotune", texts, "--field", "body", "--tokenizer", tmp_path / "made" / "tokenizer", "--steps", 12, "--step-ms", 1)
    ran = armillary(*command, "--batch", 2, "--trace", tmp_path / "trace.json")
    assert "12 steps in 2 epochs" in ran.stdout
    assert [line.split()[0] for line in ran.stdout.splitlines()[1:7]] == ["files", "read", "tokenize", "batch", "prefetch", "consumer"]
    assert "tokenize 0" in armillary("trace", "show", tmp_path / "trace.json").stdout
    facts = json.loads(armillary(*command, "--json").stdout)
    assert set(facts["numbers"]) == {"read", "tokenize", "prefetch"}
    assert facts["bottleneck"] in {row["name"] for row in facts["rows"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("prepare", "shakspeare", "--train-bpe", 300, "--out", "o"), "did you mean shakespeare?"),
        (("prepare", "sotu", "--out", "o"), "give either --tokenizer MODEL or --train-bpe SIZE"),
        (("dedup", "/nowhere.txt"), "/nowhere.txt does not exist"),
        (("inspect", "/nowhere"), "armillary data prepare"),
    ],
)
def test_mistakes_are_named(armillary: Command, arguments: tuple[object, ...], message: str) -> None:
    ran = armillary("data", *arguments)
    assert ran.returncode == 2
    assert message in ran.stderr


def test_the_corpora_are_listed(armillary: Command, tmp_path: Path) -> None:
    listed = json.loads(armillary("data", "list", "--json", ARMILLARY_HOME=str(tmp_path)).stdout)
    assert {corpus["name"]: corpus["cached"] for corpus in listed}.keys() == {"sotu", "moby-dick", "shakespeare", "shakespeare-folio"}
    assert not any(corpus["cached"] for corpus in listed)
