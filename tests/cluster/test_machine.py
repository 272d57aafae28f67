"""A machine's description agrees with the operating system's, and every slow path names its cause."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from armillary.cluster.cgroup import Limits, cgroup_limits
from armillary.cluster.machine import Machine, describe, physical_cores, slow_paths
from armillary.cluster.measure import measure
from armillary.core.errors import InputError
from armillary.core.units import GB

WHOLE = Machine(
    system="Linux", python="3.11", torch="2.13", cpu="x", physical_cores=2, logical_cores=2, allowed_cores=2, cpu_limit=None,
    isa=("avx2", "avx512f", "avx512_vnni", "avx512_bf16"), memory_total=64 * GB, memory_available=32 * GB, memory_limit=None,
    gpus=(), compiler="g++ 12",
)  # fmt: skip


def test_it_agrees_with_the_system() -> None:
    machine = describe()
    assert machine.logical_cores == os.cpu_count()
    assert 1 <= machine.physical_cores <= machine.logical_cores
    assert 0 < machine.usable_cores <= machine.allowed_cores <= machine.logical_cores
    assert (machine.compiler is None) == (shutil.which("g++") is None and shutil.which("clang++") is None and not os.environ.get("CXX"))
    if Path("/proc/meminfo").exists():
        assert machine.memory_total == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        assert machine.memory_available is not None
        assert 0 < machine.memory_available <= machine.memory_total
    assert machine.rates is None


def test_rates_are_of_the_work_they_name() -> None:
    """A machine that multiplies under 0.1 GFLOP/s or over 10 PFLOP/s is not one: this catches a wrong unit, not a slow machine."""
    rates = measure(seconds=0.02, buffer_bytes=4_000_000)
    assert 1e8 < rates.gemm < 1e16
    assert 1e7 < rates.memory_read < 1e14
    assert rates.threads >= 1
    with pytest.raises(InputError):
        measure(seconds=-1)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"compiler": None}, "apt install g++"),
        ({"torch": None}, "pip install torch"),
        ({"isa": ("avx2",)}, "no AVX-512"),
        ({"isa": ()}, "no AVX2"),
        ({"isa": ("avx2", "avx512f", "avx512_bf16")}, "no VNNI"),
        ({"isa": ("avx2", "avx512f", "avx512_vnni")}, "bfloat16 is emulated"),
        ({"logical_cores": 4}, "4 logical cores share 2"),
        ({"cpu_limit": 0.5}, "0.5 of 2 cores"),
        ({"memory_limit": GB}, "only 1 GB of memory"),
    ],
)
def test_each_lack_is_said_and_nothing_else(change: dict[str, object], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARMILLARY_NATIVE", raising=False)
    before, after = slow_paths(WHOLE), slow_paths(replace(WHOLE, **change))  # type: ignore[arg-type]
    assert not any(says in line for line in before)
    assert any(says in line for line in after)
    assert set(before) <= set(after)


def write(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root


def test_hyper_threads_share_a_core(tmp_path: Path) -> None:
    cpu = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    write(tmp_path, {cpu.format(i): f"{i % 2},{i % 2 + 2}\n" for i in range(4)})
    assert physical_cores(tmp_path) == 2
    assert physical_cores(tmp_path / "nowhere") is None


def test_limits_of_version_2_are_the_tightest_on_the_way_up(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pods/one\n",
            f"{group}/pods/one/cpu.max": "max 100000\n",
            f"{group}/pods/one/memory.max": "8000000000\n",
            f"{group}/pods/cpu.max": "150000 100000\n",
            f"{group}/pods/memory.max": "max\n",
        },
    )
    assert cgroup_limits(tmp_path) == Limits(1.5, 8_000_000_000)


def test_limits_of_version_1(tmp_path: Path) -> None:
    group = "sys/fs/cgroup"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n3:pids:/\n",
            f"{group}/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",  # inside the container the path itself is not mounted
            f"{group}/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            f"{group}/memory/docker/abc/memory.limit_in_bytes": "2000000000\n",
            f"{group}/memory/memory.limit_in_bytes": "9223372036854771712\n",
        },
    )
    assert cgroup_limits(tmp_path) == Limits(0.5, 2_000_000_000)


@pytest.mark.parametrize(
    "files", [{}, {"proc/self/cgroup": "0::/../../etc\nnonsense\n"}, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "x 0"}]
)
def test_no_or_strange_control_groups_mean_no_limit(tmp_path: Path, files: dict[str, str]) -> None:
    assert cgroup_limits(write(tmp_path, files)) == Limits()
