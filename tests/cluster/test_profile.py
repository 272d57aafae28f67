"""Profiles: what was measured is kept whole, damaged files are told, and a profile is a device and a cluster."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.cluster import profile as profiles
from armillary.cluster.cluster import cluster
from armillary.cluster.link_rates import measure_links
from armillary.cluster.machine import describe
from armillary.cluster.memory_rates import measure_memory
from armillary.cluster.others import Others
from armillary.cluster.profile import Identity, LinkRate, MemoryRate, ProductRate, Profile, Transfer
from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError


def made(**changes: Any) -> Profile:
    values: dict[str, Any] = {
        "machine": Identity(cpu="C", system="S", isa=("avx2",), physical_cores=2, usable_cores=2, memory=8 * 10**9, torch="2"),
        "taken": "2026-01-01T00:00:00+00:00",
        "seconds": 40.0,
        "load_before": 0.1,
        "load_after": 1.0,
        "others": 0.01,
        "products": (
            ProductRate(library="torch", dtype="fp32", threads=1, m=1, n=100, k=100, seconds=1e-6),
            ProductRate(library="torch", dtype="fp32", threads=1, m=64, n=100, k=100, seconds=1e-5),
            ProductRate(library="armillary", dtype="fp32", threads=1, m=64, n=100, k=100, seconds=5e-6),
        ),
        "memory": tuple(
            MemoryRate(operation=operation, threads=threads, size=10**8, bandwidth=bandwidth)
            for operation, threads, bandwidth in (("read", 1, 1e10), ("read", 2, 1.5e10), ("copy", 1, 2e10))
        ),
        "links": (LinkRate(name="loopback", transfers=(Transfer(size=8, seconds=1e-5), Transfer(size=10**6, seconds=2e-4))),),
    }
    return Profile(**values | changes)


def test_a_profile_comes_back_as_it_was(tmp_path: Path) -> None:
    whole = made(engine={"linear": ({"tokens": 1.0, "ms": 0.5},)})
    whole.save(tmp_path / "deep" / "p.json")
    assert profiles.load(tmp_path / "deep" / "p.json") == whole
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["p.json"]


def test_rates_are_work_over_time() -> None:
    whole = made()
    assert whole.products[1].flops == 2 * 64 * 100 * 100 / 1e-5
    assert whole.product("fp32", 64).library == "armillary"
    assert whole.product("fp32", 64, "torch").seconds == 1e-5
    assert (whole.links[0].latency, whole.links[0].bandwidth) == (10_000, 5e9)
    link = whole.links[0].link(whole.source)
    assert link.seconds(5 * 10**9) == pytest.approx(1 + 1e-5)


def test_a_profile_is_a_device_and_a_cluster(tmp_path: Path) -> None:
    whole = made()
    device = whole.device()
    assert (device.peak("fp32"), device.bandwidth, device.memory) == (2 * 64 * 100 * 100 / 5e-6, 1.5e10, 8 * 10**9)
    assert device.provenance["flops.fp32"].source.startswith("measured: C")
    assert device.provenance["flops.fp32"].confirmed
    whole.save(tmp_path / "here.json")
    assert cluster(str(tmp_path / "here.json")).device == device


def test_a_disturbed_measurement_is_not_confirmed() -> None:
    noisy = made(load_before=3.0, others=0.4)
    assert [reason.split(" ")[0] for reason in noisy.disturbances] == ["the", "other"]
    assert not noisy.device().provenance["bandwidth"].confirmed
    assert made(others=None).disturbances == ()


def test_another_machine_is_noticed() -> None:
    here = describe()
    ours = made(machine=Identity.of(here))
    assert ours.differs(here) == ()
    other = made(machine=Identity.of(here).model_copy(update={"cpu": "another"}))
    assert other.differs(here) == (f"cpu: another, now {here.cpu}",)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v | {"version": 2}, "another version than 1"),
        (lambda v: v | {"seconds": -1}, "seconds: Input should be greater than 0"),
        (lambda v: v | {"memory": [{**v["memory"][0], "operation": "guess"}]}, "memory.0.operation"),
        (lambda v: v | {"surprise": 1}, "surprise"),
        (lambda v: {key: value for key, value in v.items() if key != "machine"}, "machine"),
        (lambda v: [], "the profile"),
    ],
)
def test_a_bad_profile_names_the_key(tmp_path: Path, change: Any, problem: str) -> None:
    path = tmp_path / "p.json"
    path.write_text(json.dumps(change(made().model_dump(mode="json"))))
    with pytest.raises(FormatError) as caught:
        profiles.load(path)
    assert problem in caught.value.problem
    assert str(path) in caught.value.problem


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("p") / "p.json"
    path.write_bytes(content)
    with pytest.raises(ArmillaryError):
        profiles.load(path)


def test_what_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError) as caught:
        profiles.load(tmp_path / "absent.json")
    assert "armillary calibrate" in caught.value.fix
    with pytest.raises(InputError, match=r"no product of int4 weights by 64 tokens.*fp32 by 64"):
        made().product("int4", 64)
    with pytest.raises(InputError, match="lacks products"):
        made(products=()).device()


def test_links_between_two_processes() -> None:
    loopback, shared = measure_links(seconds=0.01, sizes=(8, 100_000))
    assert (loopback.name, shared.name) == ("loopback", "shared-memory")
    for rate in (loopback, shared):
        assert [each.size for each in rate.transfers] == [8, 100_000]
        assert 0 < rate.latency < 10**10


def test_memory_rates_are_of_the_bytes_they_name() -> None:
    import torch

    before = torch.get_num_threads()
    rates = measure_memory(1, size=4_000_000, seconds=0.01)
    assert [rate.operation for rate in rates] == ["read", "write", "copy"]
    assert all(rate.size <= 4_000_000 and rate.bandwidth > 1e7 for rate in rates)
    assert torch.get_num_threads() == before


def test_others_are_what_is_neither_ours_nor_idle(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    stat = tmp_path / "proc" / "stat"
    stat.write_text("cpu  100 0 50 1000 0 0 0 7 0 0\ncpu0 1\n")
    others = Others(tmp_path)
    stat.write_text("cpu  100 0 10050 9000 0 0 0 900 0 0\n")  # 100 s of work at 100 ticks a second; idle and stolen time do not count
    assert (others.share(2) or 0) > 10
    stat.write_text("nonsense")
    assert others.share(2) is None
    assert Others(tmp_path / "absent").share(2) is None
    if sys.platform == "linux":
        assert Others().share(2) is not None
