"""`armillary reproduce` prints ours beside the published figure, and its exit status is the verdict."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Command

from armillary.cli import main
from armillary.core.trace import Trace
from armillary.reproduce import registry

GOOD = registry.exactly("mean <latency>", "iterations", 9, "the paper", 9)


def experiment(*rows: registry.Row) -> registry.Experiment:
    trace = Trace("t")
    trace.add("lane", "kind", 0, 10)
    result = registry.Result(rows, (("a picture", trace),))
    return registry.Experiment("known", "A System", "Some et al.", "9 iterations", "on paper", "a moment", lambda: result)


@pytest.mark.parametrize(("ours", "status", "verdict"), [(9.0, 0, "yes"), (8.5, main.FAILED, "NO")])
def test_the_verdict(ours: float, status: int, verdict: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = replace(GOOD, ours=ours)
    monkeypatch.setattr(registry, "get", lambda name: experiment(GOOD, row))
    assert main.run(["reproduce", "known"]) == status
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split("  ")[-1] == "the paper"
    assert verdict in line
    assert main.run(["reproduce", "known", "--json"]) == status
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][1]["ratio"] == ours / 9
    assert (told["holds"], told["rows"][1]["ours"], told["rows"][1]["published"]) == (status == 0, ours, 9)


def test_the_page_has_the_table_and_the_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(registry, "get", lambda name: experiment(GOOD))
    assert main.run(["reproduce", "known", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<td>mean &lt;latency&gt;</td><td>9 iterations</td><td>9 iterations</td><td>1.00</td><td>yes</td>" in page
    assert page.count('class="armillary-gantt"') == 1
    assert f"wrote {tmp_path / 'page.html'}" in capsys.readouterr().out


def test_without_a_name_it_lists(armillary: Command) -> None:
    lines = armillary("reproduce").stdout.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(registry.names())
    assert [e["name"] for e in json.loads(armillary("reproduce", "--json").stdout)] == list(registry.names())


def test_an_unknown_name_and_a_page_that_cannot_be_written_are_refused_at_once(armillary: Command, tmp_path: Path) -> None:
    unknown = armillary("reproduce", "orka")
    assert (unknown.returncode, "did you mean orca?" in unknown.stderr) == (2, True)
    nowhere = armillary("reproduce", "orca", "--html", tmp_path / "absent" / "page.html")
    assert (nowhere.returncode, "does not exist" in nowhere.stderr) == (2, True)
