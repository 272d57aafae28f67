"""The catalogue: every figure has a source, figures agree with each other and with published sums, and bad files say what is wrong."""

from __future__ import annotations

import dataclasses
import pickle
import tempfile
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.cluster import catalogue
from armillary.cluster.catalogue import load
from armillary.cluster.device import Device, Dtype
from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError

PACKAGED = load()
DEVICES = list(PACKAGED.devices.values())


def figures(entry: object) -> set[str]:
    """The dotted names of an entry's numbers that need a source."""
    names = {
        "memory",
        "bandwidth",
        "latency",
        "cache",
        "power",
        "idle_power",
        "price",
        "gemm_efficiency",
        "memory_efficiency",
        "host_memory",
    }
    found = {name for name in names if getattr(entry, name, None) is not None}
    if isinstance(entry, Device):
        found |= {f"flops.{dtype}" for dtype in entry.flops}
    if getattr(entry, "disk", None) is not None:
        found |= {"disk.size", "disk.read", "disk.write"}
    return found


@pytest.mark.parametrize("table", ["devices", "links", "nodes", "racks"])
def test_every_packaged_figure_has_a_source_and_what_is_confirmed_has_an_address(table: str) -> None:
    for name, entry in getattr(PACKAGED, table).items():
        shape = {"shape"} if table in ("nodes", "racks") else set()
        assert set(entry.provenance) == figures(entry) | shape, name
        for key, provenance in entry.provenance.items():
            assert provenance.source, f"{name}.{key}"
            assert provenance.url or not provenance.confirmed, f"{name}.{key} is said to be confirmed and names no address"


@pytest.mark.parametrize("device", DEVICES, ids=lambda device: device.name)
def test_narrower_types_are_no_slower(device: Device) -> None:
    assert set(device.flops) <= set(get_args(Dtype))
    order = [device.flops[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8", "fp4") if dtype in device.flops]
    assert order == sorted(order)
    if "fp16" in device.flops and "bf16" in device.flops:
        assert device.flops["fp16"] == device.flops["bf16"]


def test_peaks_are_dense() -> None:
    """Datasheets print the doubled figure of structured sparsity: 624, 1,979 and 3,958 would be wrong here."""
    assert catalogue.device("a100").peak("bf16") == 312e12
    assert catalogue.device("h100").peak("bf16") == 989.4e12
    assert catalogue.device("h100").peak("fp8") == 1978.9e12
    assert round(catalogue.device("h100").ridge("bf16")) == 295


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        (lambda c: 72 * 2 * c.rack("gb200-nvl72").link.bandwidth, 130e12),  # "130 TB/s" of NVLink, both ways
        (lambda c: 8 * 2 * c.node("dgx-b200").link.bandwidth, 14.4e12),
        (lambda c: 8 * c.device("b200").memory, 1440e9),
        (lambda c: 72 * c.device("gb200").peak("fp8"), 360e15),  # 720 PFLOP/s with sparsity
        (lambda c: 4096 * c.device("tpu-v4").peak("bf16"), 1.1e18),
        (lambda c: c.node("dgx-a100").devices * c.device("a100").peak("int8"), 5e15),
        (lambda c: c.node("p5").network_bandwidth * 8, 3200e9),
        (lambda c: c.node("p4d").network_bandwidth * 8, 400e9),
        (lambda c: c.link("pcie-3").bandwidth, 8e9 * 16 * 128 / 130 / 8),
        (lambda c: c.link("pcie-5").bandwidth, 32e9 * 16 * 128 / 130 / 8),
        (lambda c: c.node("p5").hourly_price / 8, 6.88),
    ],
)
def test_figures_add_up_to_published_totals(ours: object, published: float) -> None:
    assert ours(PACKAGED) == pytest.approx(published, rel=0.025)  # type: ignore[operator]


def test_links_and_hosts_of_nodes_fit_their_devices() -> None:
    for node in PACKAGED.nodes.values():
        if node.link is not None:
            assert node.link.name.removesuffix("-tray") == node.device.link
        assert node.host_link is not None
        assert node.host_link.name == node.device.host_link
        assert node.cpu is None or node.cpu.kind == "cpu"


def test_entries_are_values() -> None:
    device = catalogue.device("h100")
    assert pickle.loads(pickle.dumps(device)) == device
    assert dataclasses.asdict(device)["flops"]["bf16"] == device.peak("bf16")
    assert len({device, catalogue.device("h100-sxm")}) == 1


def test_an_unknown_dtype_names_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"a100-80g-sxm has no peak for 'fp8'.*int8"):
        catalogue.device("a100").peak("fp8")


@pytest.mark.parametrize(
    ("name", "close"), [("h10", "h100"), ("a100-80gb-sxm", "a100-80g-sxm"), ("dgxh100", "dgx-h100"), ("NVL72", "nvl72")]
)
def test_an_unknown_name_is_told_with_the_closest_ones(name: str, close: str) -> None:
    with pytest.raises(NotFoundError) as caught:
        PACKAGED.find(name)
    assert close in caught.value.fix


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=40))
def test_any_text_is_found_or_refused(name: str) -> None:
    try:
        told = PACKAGED.find(name).name
    except NotFoundError as error:
        told = error.fix
    assert told


OWN = """
[sources.quote]
title = "an offer of May"

[device.toy]
title = "Toy"
vendor = "ours"
kind = "gpu"
flops.fp16 = 1e12
memory = "1 GiB"
bandwidth = 5e10
link = "pcie-4"

[device.h100-sxm]
price = { value = 2.0, source = "quote" }
flops.bf16 = { value = 9e14, confirmed = false, note = "throttled" }
"""


def test_a_file_of_ones_own_adds_devices_and_changes_figures(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(OWN)
    mine = load(folder=tmp_path)
    toy, h100 = mine.device("toy"), mine.device("h100")
    assert (toy.peak("fp16"), toy.memory, toy.cache) == (1e12, 2**30, None)
    assert toy.provenance["memory"].source == f"file {tmp_path / 'own.toml'}"
    assert (h100.price, h100.provenance["price"].source) == (2.0, "an offer of May")
    assert (h100.peak("bf16"), h100.peak("fp8")) == (9e14, 1978.9e12)
    assert not h100.provenance["flops.bf16"].confirmed
    assert mine.node("dgx-h100").device == h100
    assert PACKAGED.device("h100").price == 3.29


@pytest.mark.parametrize(
    ("text", "problem", "fix"),
    [
        ("[device.x]\ntitel = 'X'", "device.x: unknown key 'titel'", "did you mean 'title'?"),
        ("[device.x]\ntitle = 'X'\nvendor = 'v'\nkind = 'gpu'", "device.x lacks flops, memory, bandwidth", "docs/cluster.md"),
        (OWN.replace("pcie-4", "pcie-9"), "device.toy: the catalogue has no link called 'pcie-9'", "pcie-"),
        (OWN.replace("source = 'quote'", "").replace('"quote"', '"qoute"'), "names the source 'qoute'", "add [sources.qoute]"),
        (OWN.replace("5e10", "-1"), "device.toy.bandwidth.value: -1.0 is no figure", "above 0"),
        (OWN.replace("1 GiB", "lots"), "'lots' is not a size in bytes", "2GB or 512 MiB"),
        (OWN.replace("kind = \"gpu\"", "kind = \"npu\""), "device.toy.kind = 'npu' is out of bounds", "'gpu', 'tpu' or 'cpu'"),
        (OWN.replace("fp16 = 1e12", "fp17 = 1e12"), "device.toy.flops.fp17", "'fp16'"),
        ("[device.toy]\naliases = ['h100']", "device.toy takes the name 'h100' of device.h100-sxm", "another name"),
        ("[device.'Big Iron']\ntitle = 'X'", "Big Iron", "pattern"),
        ("[node.n]\ntitle='N'\ndevice='h100'\ndevices=2\nfabric='switch'", "joins 2 devices by a switch of no link", "give `link`"),
        ("[node.n]\ntitle='N'\ndevice='h100'\ndevices=1\nfabric='none'\nnics=1", "needs both `network` and `nics`", "give both"),
        ("[rack.r]\ntitle='R'\nnode='dgx-h100'\nnodes=2\nfabric='torus'\nlink='ici-v4'\nshape=[3,3]", "16 devices on a torus of 3 x 3", "multiply"),
        ("[device", "is not TOML", "correct that line"),
    ],
)  # fmt: skip
def test_a_bad_file_names_the_key_and_the_fix(tmp_path: Path, text: str, problem: str, fix: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        load([path])
    assert problem in caught.value.problem
    assert fix in caught.value.fix
    assert str(path) in caught.value.problem


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"absent\.toml"):
        load([tmp_path / "absent.toml"])


@settings(max_examples=30, deadline=None)
@given(
    st.dictionaries(st.sampled_from(["title", "device", "devices", "fabric", "link", "nics", "power"]), st.integers() | st.text(max_size=5))
)
def test_any_node_is_built_or_refused(values: dict[str, int | str]) -> None:
    lines = [
        f"{key} = {value!r}" if isinstance(value, int) else f'{key} = "{value.encode("ascii", "ignore").hex()}"'
        for key, value in values.items()
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "n.toml"
        path.write_text("\n".join(["[node.n]", *lines]))
        try:
            told = load([path]).node("n").provenance["shape"].source
        except ArmillaryError as error:
            told = error.problem
        assert str(path) in told
