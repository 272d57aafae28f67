"""`armillary doctor` tells what `cluster.machine` found, whole."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import Command

from armillary.cluster.machine import describe, slow_paths


def test_as_json_it_is_the_machines_description(armillary: Command, tmp_path: Path) -> None:
    told = json.loads(armillary("doctor", "--json", "--no-measure", ARMILLARY_HOME=str(tmp_path / "new")).stdout)
    machine = describe()
    assert (told["cpu"], tuple(told["isa"]), told["physical_cores"]) == (machine.cpu, machine.isa, machine.physical_cores)
    assert told["rates"] is None
    assert tuple(told["slow"]) == slow_paths(machine)
    assert told["cache"] == str(tmp_path / "new")
    assert told["cache_writable"] is True
    assert not (tmp_path / "new").exists()


def test_in_lines_every_slow_path_is_named_with_its_reason(armillary: Command) -> None:
    lines = armillary("doctor").stdout.splitlines()
    for slow in slow_paths(describe()):
        assert f"- {slow}" in lines
    assert any(line.startswith("fp32 products") and "FLOP/s measured" in line for line in lines)
    assert any(line.startswith("memory reads") and "B/s measured" in line for line in lines)


def test_without_a_compiler_it_says_what_that_costs(armillary: Command) -> None:
    assert "native kernels are off" in armillary("doctor", "--no-measure", ARMILLARY_NATIVE="0").stdout
