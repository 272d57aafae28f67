"""`armillary batch` answers a file of requests in order, and loads nothing for one that is no such file."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Command

from armillary.cli.main import FAILED, MISUSED


def line(name: str, **body: object) -> str:
    return json.dumps({"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": "a", "max_tokens": 4, **body}})


def test_results_come_in_the_order_of_the_lines(armillary: Command, tiny_model: Path, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    asked = [line(str(number), temperature=0, prompt="a" * (1 + number % 5), ignore_eos=True) for number in range(20)]
    source.write_text("\n".join([*asked, line("bad", temperature=9)]))
    ran = armillary("batch", source, tiny_model, "-o", output, "--threads", "1", "--json")
    assert ran.returncode == FAILED
    told = json.loads(ran.stdout)
    assert (told["lines"], told["failed"]) == (21, 1)
    rows = [json.loads(row) for row in output.read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == [*map(str, range(20)), "bad"]
    texts = [row["response"]["body"]["choices"][0]["text"] for row in rows[:20]]
    assert texts[:5] * 4 == texts  # an answer does not depend on its company
    assert (rows[20]["response"]["status_code"], rows[20]["response"]["body"]["error"]["param"]) == (400, "temperature")
    again = armillary("batch", source, tiny_model, "-o", output)
    assert again.returncode == MISUSED
    assert "--overwrite" in again.stderr


def test_a_bad_line_is_named_before_anything_is_loaded(armillary: Command, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(f"{line('a')}\n{line('a')}\n")
    ran = armillary("batch", source, "smollm2", "-o", tmp_path / "out.jsonl")
    assert ran.returncode == MISUSED
    assert "line 2: custom_id 'a' is given twice" in ran.stderr
    assert "loading" not in ran.stderr
    assert not (tmp_path / "out.jsonl").exists()
    missing = armillary("batch", tmp_path / "none.jsonl", "smollm2", "-o", tmp_path / "out.jsonl")
    assert missing.returncode == MISUSED
