"""`armillary cluster` and `armillary calibrate`: names to tables with sources, a machine to a profile."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from armillary.cli.main import run
from armillary.cluster import catalogue, profile
from armillary.cluster.cluster import cluster
from armillary.cluster.machine import describe

Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Said:
    """What a command line prints; no files of the user's own are read."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))

    def command(*arguments: object) -> str:
        assert run([str(argument) for argument in arguments]) == 0
        return capsys.readouterr().out

    return command


def test_the_list_has_every_name(said: Said) -> None:
    answer = said("cluster")
    known = catalogue.load()
    words = set(answer.split())
    assert {*known.devices, *known.nodes, *known.racks, *known.links} <= words
    assert "2.04 TB/s" in answer


def test_show_has_units_sources_and_doubts(said: Said) -> None:
    answer = said("cluster", "show", "t4")
    assert "65 TFLOP/s" in answer
    assert "product brief" in answer
    assert "unconfirmed: Amazon EC2 g4dn.xlarge on demand" in answer
    assert "1 figure is unconfirmed" in answer
    cube = said("cluster", "show", "tpu-v4-cube")
    assert "4 x 4 x 4" in cube


def test_show_tells_what_a_spelling_means(said: Said) -> None:
    answer = said("cluster", "show", "h100x4:4/roce-400")
    assert "16 x h100-sxm in 4 nodes (4 of the 8 devices of dgx-h100)" in answer
    assert "4 x roce-400 a node, 50 GB/s a device" in answer
    found = json.loads(said("cluster", "show", "dgx-h100:2", "--json"))
    assert found["cluster"]["memory"] == "1.28 TB"
    assert found["h100-sxm"]["provenance"]["memory"]["confirmed"] is True


def test_a_file_of_ones_own(said: Said, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text("[device.h100-sxm]\nprice = 2.5\n")
    answer = said("cluster", "show", "8xh100", "--catalogue", path)
    assert "$20.00/h" in answer
    assert f"file {path}" in answer


def test_an_unknown_name_is_two_lines_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["cluster", "show", "h10"]) == 2
    ran = capsys.readouterr()
    assert ran.out == ""
    assert ran.err.splitlines() == [
        "error: the catalogue has no device, node or rack called 'h10'",
        "  fix: did you mean h100 or v100 or h200?",
    ]


def test_calibrate_writes_a_profile_that_is_a_cluster(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "here.json"
    assert run(["calibrate", "--quick", "--threads", "1", "--output", str(path)]) == 0
    ran = capsys.readouterr()
    assert f"Written to {path}." in ran.out
    written = profile.load(path)
    assert {rate.operation for rate in written.memory} == {"read", "write", "copy"}
    assert {rate.name for rate in written.links} == {"loopback", "shared-memory"}
    assert written.engine == {}
    assert cluster(str(path)).device.peak("fp32") > 0
    assert ("warning: " in ran.err) == bool(written.disturbances)


def test_calibrate_refuses_threads_that_are_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["calibrate", "--threads", "100000"]) == 2
    assert "cannot calibrate with 100000 threads" in capsys.readouterr().err


def test_calibrate_adds_an_engine_to_the_profile(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_model: Path) -> None:
    path, machine = tmp_path / "here.json", profile.Identity.of(describe())
    assert run(["calibrate", "--quantize", "int4", "--output", str(path)]) == 2
    assert "give --model, too" in capsys.readouterr().err
    profile.Profile(machine=machine, taken="today", seconds=1, load_before=0, load_after=0, others=None).save(path)
    assert run(["calibrate", "--quick", "--model", str(tiny_model), "--threads", "1", "--kv-blocks", "40", "--output", str(path)]) == 0
    ran = capsys.readouterr()
    assert "an iteration takes" in ran.out
    assert "left out" in ran.out
    written = profile.load(path)
    ((name, rows),) = written.engine.items()
    assert name.endswith("fp32 weights, fp32 cache, 1 threads")
    assert {row["kind"] for row in rows} == {"about", "executor", "engine"}
    assert ("warning: " in ran.err) == bool(rows[0]["disturbed"])
    assert written.taken == "today"
    written.model_copy(update={"machine": machine.model_copy(update={"cpu": "another"})}).save(path)
    assert run(["calibrate", "--quick", "--model", str(tiny_model), "--output", str(path)]) == 2
    assert "another machine's profile" in capsys.readouterr().err
