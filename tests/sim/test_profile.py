"""Measured operations: the packaged tables are the published measurements, and what a file lacks is said."""

import pytest

from armillary.core.errors import FormatError, InputError
from armillary.core.units import MS
from armillary.sim.costs.profile import OPERATIONS, packaged, profile

SEVEN, SEVENTY = (32, 32, 4096, 11008), (64, 8, 8192, 28672)
HEADER = ",".join([f"time_stats.{part}.median" for parts in OPERATIONS.values() for part in parts])
SHAPE = "n_head,n_kv_head,n_embd,n_expanded_embd,num_tokens,num_tensor_parallel_workers"


@pytest.mark.parametrize(
    ("device", "shape", "degree", "operation", "ms"),
    [
        ("a100", SEVEN, 1, "qkv", (0.065, 0.067, 0.234, 0.979)),
        ("a100", SEVEN, 1, "gate_up", (0.116, 0.116, 0.402, 1.694)),
        ("a100", SEVEN, 1, "down", (0.060, 0.068, 0.229, 0.851)),
        ("h100", SEVENTY, 8, "gate_up", (0.044, 0.045, 0.091, 0.334)),
        ("h100", SEVENTY, 8, "down", (0.022, 0.025, 0.045, 0.152)),
    ],
)
def test_the_packaged_tables_are_what_was_measured_at_1_64_512_and_2048_tokens(device, shape, degree, operation, ms):
    curve = packaged(device).layers[shape][degree][operation]
    layer = [sum(one.at(tokens) for one in packaged(device).layers[shape][degree].values()) for tokens in (1, 64, 512, 2048)]
    for tokens, expected, whole in zip((1, 64, 512, 2048), ms, layer, strict=True):
        assert abs(curve.at(tokens) - expected * MS) <= 0.04 * whole


def test_collectives_are_within_the_stated_error_and_grow_in_proportion_beyond_the_last():
    curve = packaged("h100").collectives["all_reduce", 8, 8]
    assert [curve.at(size) / MS for size in (2.26e6, 13.1e6, 67.1e6)] == pytest.approx([0.044, 0.108, 0.322], rel=0.1)
    assert curve.at(2 * curve.sizes[-1]) == pytest.approx(2 * curve.ns[-1])


def test_a_file_of_one_s_own(tmp_path):
    layers, sent = tmp_path / "mlp.csv", tmp_path / "all_reduce.csv"
    row = "1,0.2,2,1,1,0.4,3,1,2,0.5,32,32,4096,11008"
    layers.write_text(f"{HEADER},{SHAPE}\n{row},1,2\n{row},1,2\n{row.replace('1,0.2', '3,0.2', 1)},3,2\n")
    sent.write_text("time_stats.all_reduce.median,num_workers,size,devices_per_node\n0.01,2,2048,2\n0.03,2,6144,2\n")
    read = profile(f"{layers},{sent}")
    assert read.layers[SEVEN][2]["embed"].at(2) == 2 * MS
    assert read.layers[SEVEN][2]["norm"].at(1) == pytest.approx(1.1 * MS)  # the mean of 0.2 and 2, in the order of OPERATIONS
    assert read.collectives["all_reduce", 2, 2].at(4096) == pytest.approx(0.02 * MS)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a,b\n1,2\n", "has no column"),
        (f"{HEADER},{SHAPE}\n", "no measurements"),
        (f"{HEADER},{SHAPE}\n{','.join(['x'] * 16)}\n", "line 2"),
        (f"{HEADER},{SHAPE}\n{','.join(['1'] * 15)},-1\n", "line 2"),
    ],
)
def test_what_a_file_lacks_is_said(tmp_path, text, said):
    path = tmp_path / "mlp.csv"
    path.write_text(text)
    with pytest.raises(FormatError, match=said):
        profile(str(path))


def test_neither_a_name_nor_a_file():
    with pytest.raises(InputError, match="neither a packaged profile nor a file"):
        profile("a101")
