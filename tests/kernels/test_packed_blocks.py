"""GGUF blocks laid out as they are: what the kernels then hold is what the file says, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import FormatError, InputError
from armillary.kernels import cpu_library
from armillary.kernels.packed_weight import Blocks, PackedWeight, takes_straight
from armillary.models.gguf.quant import dequantise_blocks
from armillary.models.gguf.types import BY_NAME

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

EXACT = [("Q4_0", "int4"), ("Q4_0", "int4m"), ("Q4_0", "int8"), ("Q4_1", "int4m"), ("Q8_0", "int8")]
HALVES = {"Q4_0": (0,), "Q4_1": (0, 2), "Q8_0": (0,), "Q4_K": (0, 2)}  # where a block keeps its float16 numbers


def blocks_of(kind: str, n: int, k: int, seed: int, halves: np.ndarray | None = None) -> Blocks:
    """Random levels, and scales drawn from `halves` (default: every finite float16 below 4096, zeros and subnormals among them)."""
    rng = np.random.default_rng(seed)
    form = BY_NAME[kind]
    data = rng.integers(0, 256, (n * k // form.block, form.size), dtype=np.uint8)
    data[rng.random(len(data)) < 0.1, HALVES[kind][-1] + 2 :] = rng.choice([0, 0x0F, 0xF0, 0x7F, 0x80, 0xFF])  # every level at one end
    if halves is None:
        every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
        halves = every[np.abs(every) < 4096]
    for at in HALVES[kind]:
        data[:, at : at + 2] = rng.choice(halves, (len(data), 1)).view(np.uint8)
    return Blocks(kind, data.reshape(n, form.row_bytes(k)))


def meaning(blocks: Blocks) -> np.ndarray:
    return dequantise_blocks(blocks.data, BY_NAME[blocks.kind])


@settings(max_examples=80, deadline=None)
@given(pair=st.sampled_from(EXACT), n=st.integers(1, 130), groups=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_blocks_are_taken_without_loss(pair: tuple[str, str], n: int, groups: int, seed: int) -> None:
    kind, format = pair
    blocks = blocks_of(kind, n, 32 * groups, seed)
    np.testing.assert_array_equal(PackedWeight([blocks], format).unpack().numpy(), meaning(blocks))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 70), blocks=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_q4_k_is_off_by_the_rounding_of_its_scales_alone(n: int, blocks: int, seed: int) -> None:
    """w = (d sc) u - (dmin m): each factor in half precision is off by 2^-11 of itself, or by 2^-25 where it is subnormal."""
    stored = blocks_of("Q4_K", n, 256 * blocks, seed, np.float16([0.0, 6e-8, 1e-5, -3e-3, 0.07, 1.0, 900.0]))
    exact = meaning(stored).astype(np.float64)
    data = stored.data.reshape(-1, 144)
    bare = data.copy()
    bare[:, 2:4] = 0  # without minimums: d sc u
    scaled = dequantise_blocks(bare.reshape(stored.data.shape), BY_NAME["Q4_K"]).astype(np.float64)
    bound = 2.0**-11 * (np.abs(scaled) + np.abs(exact - scaled)) + 16 * 2.0**-25
    error = np.abs(PackedWeight([stored], "int4m").unpack().numpy() - exact)
    assert bool((error <= bound * 1.001).all())


@settings(max_examples=30, deadline=None)
@given(rows=st.lists(st.integers(1, 70), min_size=3, max_size=3), seed=st.integers(0, 2**31))
def test_stored_types_mix_in_one_weight(rows: list[int], seed: int) -> None:
    """q and k as one type and v as another, or as floats: the columns of one product, each as it would be alone."""
    a, b = blocks_of("Q4_0", rows[0], 256, seed), blocks_of("Q4_K", rows[1], 256, seed + 1, np.float16([0.01, 0.5]))
    c = torch.randn(rows[2], 256, generator=torch.Generator().manual_seed(seed))
    together = PackedWeight([a, b, c], "int4m").unpack()
    torch.testing.assert_close(together, torch.cat([PackedWeight([m], "int4m").unpack() for m in (a, b, c)]), rtol=0, atol=0)


@pytest.mark.parametrize(("kind", "format"), EXACT)
@pytest.mark.parametrize("rows", [1, 16, 17, 100])
def test_interleaved_tiles_alternate(kind: str, format: str, rows: int) -> None:
    gate, up = blocks_of(kind, rows, 64, 1), blocks_of(kind, rows, 64, 2)
    got = PackedWeight([gate, up], format, interleave=True).unpack().numpy()
    for index, matrix in enumerate((gate, up)):
        tiles = got.reshape(-1, 2, 16, 64)[:, index].reshape(-1, 64)[:rows]
        np.testing.assert_array_equal(tiles, meaning(matrix))


@pytest.mark.parametrize(("kind", "format"), [*EXACT, ("Q4_K", "int4m")])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_scale_that_is_not_finite_is_refused(kind: str, format: str, bad: float) -> None:
    for at in HALVES[kind]:
        blocks = blocks_of(kind, 40, 512, 0, np.float16([0.5]))
        form = BY_NAME[kind]
        blocks.data[33, form.size + at : form.size + at + 2] = np.float16([bad]).view(np.uint8)
        with pytest.raises(InputError, match=r"\[40\] rows by 512 has NaN or infinite"):
            PackedWeight([blocks], format)


def test_what_half_precision_does_not_hold_is_refused() -> None:
    """Finite as floats, infinite as halves: never a wrong number."""
    large = np.float16([60000.0])
    levels = np.full((16, 144), 0xFF, np.uint8)
    levels[:, :2] = levels[:, 2:4] = large.view(np.uint8)
    for blocks, format in ((Blocks("Q4_K", levels), "int4m"), (blocks_of("Q4_0", 4, 32, 0, large), "int4m")):
        with pytest.raises(InputError, match="too large for the half-precision numbers"):
            PackedWeight([blocks], format)
    assert torch.isfinite(PackedWeight([blocks_of("Q4_0", 4, 32, 0, large)], "int4").unpack()).all()
    for format, size in (("fp16", 7e4), ("int8", 1e7), ("int4", 1e6), ("int4m", 7e4)):
        with pytest.raises(InputError, match="too large for the half-precision numbers"):
            PackedWeight([torch.full((3, 32), size)], format)
    with pytest.raises(InputError, match="too large"):
        PackedWeight([torch.full((3, 32), 1e6) * torch.tensor([1.0, -1.0]).repeat(16)], "int4m")


def test_what_does_not_fit_is_named() -> None:
    assert not takes_straight("Q6_K", "int4m")
    with pytest.raises(InputError, match="Q6_K"):
        Blocks("Q6_K", np.zeros((2, 210), np.uint8))
    with pytest.raises(InputError, match=r"\(2, 35\) are not rows of Q8_0 blocks"):
        Blocks("Q8_0", np.zeros((2, 35), np.uint8))
    with pytest.raises(InputError, match="Q4_1 blocks cannot be laid out as int4"):
        PackedWeight([blocks_of("Q4_1", 2, 32, 0)], "int4")
    with pytest.raises(InputError, match="are not one weight"):
        PackedWeight([blocks_of("Q4_0", 2, 32, 0), torch.randn(2, 64)], "int4")
    with pytest.raises(InputError, match="are not one weight"):
        PackedWeight([torch.randn(2, 64), torch.randn(3, 64)], "int4", interleave=True)


@pytest.mark.parametrize("format", ["fp32", "fp16", "int8", "int4", "int4m"])
@pytest.mark.parametrize("interleave", [False, True])
def test_a_weight_is_its_arrays(format: str, interleave: bool) -> None:
    parts, biases = [torch.randn(50, 70), torch.randn(50, 70)], [torch.randn(50), None]
    weight = PackedWeight(parts, format, biases, interleave=interleave)
    arrays = weight.arrays()
    again = PackedWeight.restore(format, weight.shape, arrays)
    x = torch.randn(3, 70)
    assert torch.equal(again.multiply(x), weight.multiply(x))
    for name, array in arrays.items():
        with pytest.raises(FormatError, match="wrong sizes"):
            PackedWeight.restore(format, weight.shape, {**arrays, name: array[:-1]})
