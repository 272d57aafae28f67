"""`armillary trace` tells a saved trace as the summary does, and draws it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import Command

from armillary.core.trace import Trace
from armillary.core.trace_summary import summarise


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    trace = Trace("two lanes")
    trace.add("engine", "step", 0, 60)
    trace.add("engine", "step", 80, 100)
    trace.add("request/a", "decode", 10, 60, "decode", {"tokens": 1})
    trace.save(tmp_path / "trace.json")
    return tmp_path / "trace.json"


def test_show_as_json_is_the_summary(armillary: Command, saved: Path) -> None:
    told = json.loads(armillary("trace", "show", saved, "--json").stdout)
    summary = summarise(Trace.load(saved))
    assert told["extent"] == summary.extent == 100
    assert [(lane["lane"], lane["busy"], lane["share"]) for lane in told["lanes"]] == [("engine", 80, 0.8), ("request/a", 50, 0.5)]


def test_show_in_lines(armillary: Command, saved: Path) -> None:
    lines = armillary("trace", "show", saved).stdout.splitlines()
    assert lines[0] == "two lanes: 3 spans on 2 lanes over 100 ns"
    assert next(line for line in lines if line.startswith("engine")).split() == ["engine", "2", "80", "ns", "80.0%", "step", "2"]


def test_a_file_that_is_no_trace_is_refused(armillary: Command, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    wrong.write_text('{"hello": 1}', encoding="utf-8")
    for verb in (["show", wrong], ["png", wrong, tmp_path / "out.png"], ["html", wrong, tmp_path / "out.html"]):
        ran = armillary("trace", *verb)
        assert (ran.returncode, len(ran.stderr.splitlines())) == (2, 2)
        assert "wrong.json" in ran.stderr
    assert not (tmp_path / "out.png").exists()
    assert not (tmp_path / "out.html").exists()
