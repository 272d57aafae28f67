"""Clusters as they are written: what a spelling means, and that any other text is refused with what to write."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armillary.cluster import catalogue
from armillary.cluster.cluster import Cluster, cluster
from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError

DEVICES = list(catalogue.load().devices)


@pytest.mark.parametrize(
    ("text", "node", "nodes", "devices", "domain", "network"),
    [
        ("h100", "h100-sxm", 1, 1, 1, None),
        ("A100", "a100-80g-sxm", 1, 1, 1, None),
        ("8xh100", "dgx-h100", 1, 8, 8, "ib-ndr"),
        ("h100x8", "dgx-h100", 1, 8, 8, "ib-ndr"),
        ("h100x8:16", "dgx-h100", 16, 128, 8, "ib-ndr"),
        ("dgx-h100:16", "dgx-h100", 16, 128, 8, "ib-ndr"),
        ("h100x8:16/roce-400", "dgx-h100", 16, 128, 8, "roce-400"),
        ("h100x4:2", "4xh100-sxm", 2, 8, 4, "ib-ndr"),
        ("4xt4:2/eth-25", "4xt4", 2, 8, 4, "eth-25"),
        ("h100:3/ib-ndr", "h100-sxm", 3, 3, 1, "ib-ndr"),
        ("mi300x8", "mi300x8", 1, 8, 8, "roce-400"),
        ("8xmi300x", "mi300x8", 1, 8, 8, "roce-400"),
        ("gb200-nvl72:2", "gb200-tray", 36, 144, 72, "ib-ndr"),
        ("tpu-v4-cube", "tpu-v4-tray", 16, 64, 64, None),
    ],
)
def test_spellings(text: str, node: str, nodes: int, devices: int, domain: int, network: str | None) -> None:
    made = cluster(text)
    assert (made.node.name, made.nodes, made.devices, made.domain) == (node, nodes, devices, domain)
    assert (made.network.name if made.network else None) == network


def test_a_share_of_a_known_node_has_its_share_of_cards_and_price() -> None:
    whole, share = cluster("p5").node, cluster("h100x2").node
    assert share.title == "2 of the 8 devices of dgx-h100"
    assert (share.nics, share.link) == (2, whole.link)
    assert cluster("h100x2").hourly_price == pytest.approx(2 * 3.29)


def test_sums() -> None:
    made = cluster("dgx-h100:16")
    assert made.memory == 128 * 80 * 10**9
    assert made.network_per_device == 50e9
    assert made.power == 16 * 10_200
    assert made.hourly_price == pytest.approx(128 * 3.29)
    assert cluster("p5:2").hourly_price == pytest.approx(2 * 55.04)  # the instance's own price, not its devices'
    assert cluster("gb200-nvl72:2").power == 240_000
    assert cluster("gb200-nvl72").hourly_price is None


@pytest.mark.parametrize(
    ("text", "kind", "problem", "fix"),
    [
        ("h10", NotFoundError, "called 'h10'", "h100"),
        ("8xh10", NotFoundError, "called 'h10'", "h100"),
        ("dgx-h10:4", NotFoundError, "called 'dgx-h10'", "dgx-h100"),
        ("h100:3", InputError, "3 of them need one", "h100:3/ib-ndr"),
        ("h100x8:16/ib", NotFoundError, "no link called 'ib'", "ib-ndr"),
        ("tpu-v4x8", InputError, "how 8 x tpu-v4 are joined", "tpu-v4-tray, tpu-v4-cube"),
        ("2xdgx-h100", InputError, "whose number is fixed", "dgx-h100:2"),
        ("nvlink-4", InputError, "is a link", "after a slash"),
        ("h100x8:0", InputError, "0 nodes", "between 1"),
        ("0xh100", InputError, "0 devices", "between 1 and 1024"),
        ("h100::", InputError, "spells no cluster", "h100x8:16/roce-400"),
        ("", InputError, "spells no cluster", "8xh100"),
        ("absent.toml", NotFoundError, "absent.toml", "check the path"),
    ],
)
def test_what_is_wrong_is_told(text: str, kind: type[ArmillaryError], problem: str, fix: str) -> None:
    with pytest.raises(kind) as caught:
        cluster(text)
    assert problem in caught.value.problem
    assert fix in caught.value.fix


@given(st.sampled_from(DEVICES), st.integers(1, 8), st.integers(1, 5000))
def test_a_count_before_the_name_is_a_count_after_it(name: str, count: int, nodes: int) -> None:
    def made(text: str) -> object:
        try:
            return cluster(text).node
        except InputError as error:
            return error.problem

    assert made(f"{count}x{name}:{nodes}/ib-ndr") == made(f"{name}x{count}:{nodes}/ib-ndr")


@settings(max_examples=60, deadline=None)
@given(
    st.text(max_size=30)
    | st.lists(st.sampled_from(["8", "x", "h100", ":", "16", "/", "ib-ndr", "0", "-", ".toml"]), max_size=7).map("".join)
)
@example("8xh100:999999999")
def test_any_text_is_a_cluster_or_refused_with_a_fix(text: str) -> None:
    try:
        told = cluster(text).node.title
    except ArmillaryError as error:
        told = error.fix
    assert told


FILE = """
[cluster]
node = "box"
count = 12
network = "roce-100"
nics = 2

[node.box]
title = "Our box"
device = "a100-80g-pcie"
devices = 4
fabric = "pcie"
link = "pcie-4"
"""


def test_a_cluster_file(tmp_path: Path) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(FILE)
    made = cluster(str(path))
    assert isinstance(made, Cluster)
    assert (made.name, made.devices, made.node.nics, made.network_per_device) == ("ours", 48, 2, 6.25e9)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (FILE.replace("[cluster]", "[sources.x]\ntitle = 'x'\n[link.y]").split("[node")[0], "unknown key"),
        ("[node.box]" + FILE.split("[node.box]")[1], "no [cluster] table"),
        (FILE.replace('"box"', '"bix"'), "called 'bix'"),
        (FILE.replace("nics = 2", "nics = 0"), "cluster.nics is 0"),
        (FILE.replace("count = 12", 'count = 12\nrack = "gb200-nvl72"'), "no [cluster] table with a node or a rack"),
    ],
)
def test_a_bad_cluster_file_names_itself(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "ours.toml"
    path.write_text(text)
    with pytest.raises(FormatError) as caught:
        cluster(str(path))
    assert problem in caught.value.problem
    assert "ours.toml" in caught.value.problem
