"""Packed products against their exact meaning, on every instruction set that this machine can run."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.packed_weight import Arena, PackedWeight

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

FORMATS = ("fp32", "fp16", "int8", "int4", "int4m")
INTEGER = ("int8", "int4", "int4m")


def quantised(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The plainest int8 quantisation of rows in groups of 32: levels and scales, padded to whole groups."""
    rows, k = x.shape
    padded = np.zeros((rows, -(-k // 32) * 32), np.float32)
    padded[:, :k] = x
    groups = padded.reshape(rows, -1, 32)
    biggest = np.abs(groups).max(-1, keepdims=True)
    inverse = np.divide(np.float32(127), biggest, out=np.zeros_like(biggest), where=biggest > 2.0**-120)
    scaled = groups * inverse
    levels = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int64)
    return levels, (biggest / np.float32(127)).squeeze(-1)


def levels_of(weight: PackedWeight, scales: np.ndarray) -> np.ndarray:
    """The integer levels of an int8 or int4 weight, relative to its zero: [n, k/32, 32]."""
    n, k = weight.shape
    values = weight.unpack().numpy().reshape(n, k // 32, 32).astype(np.float64)
    return np.rint(values / np.where(scales == 0, 1, scales)[..., None]).astype(np.int64)


def exact_dot(weight: PackedWeight, x: np.ndarray) -> np.ndarray:
    """Product of the unpacked weight with the quantised rows in float64: the integer sums inside it are exact."""
    levels, scales = quantised(x)
    meaning = np.zeros((weight.shape[0], levels.shape[1] * 32))
    meaning[:, : weight.shape[1]] = weight.unpack().numpy()
    rows = levels.astype(np.float64) * scales[..., None].astype(np.float64)
    return rows.reshape(x.shape[0], -1) @ meaning.T


@settings(max_examples=60, deadline=None)
@given(format=st.sampled_from(FORMATS), n=st.integers(1, 130), k=st.integers(1, 200), rows=st.integers(1, 37), seed=st.integers(0, 2**31))
def test_every_shape_tail(format: str, n: int, k: int, rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(n, k, generator=generator)
    x = torch.randn(rows, k, generator=generator)
    weight = PackedWeight([w], format)
    expected = x.double().numpy() @ weight.unpack().double().numpy().T if format in ("fp32", "fp16") else exact_dot(weight, x.numpy())
    np.testing.assert_allclose(weight.multiply(x).numpy(), expected, rtol=0, atol=2e-6 * k + 1e-5)


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize("sign", [1, -1])
def test_extreme_inputs_do_not_saturate(format: str, sign: int) -> None:
    """All weights at their largest level and all activations at +-127: sums that 16 bits would not hold."""
    k = 512
    w = torch.full((17, k), 1.0) * sign
    w[:, ::32] = -sign * 1.0  # so that the range is used at both ends
    for x in (torch.full((3, k), 5.0), torch.full((3, k), -5.0)):
        weight = PackedWeight([w], format)
        np.testing.assert_allclose(weight.multiply(x).numpy(), exact_dot(weight, x.numpy()), rtol=3e-6)


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_bit_equal_to_the_integer_reference(format: str) -> None:
    """With power-of-two scales every step after the integer dot product is exact, so the result must be equal bit for bit."""
    rng = np.random.default_rng(0)
    top = {"int8": 127, "int4": 8}[format]
    levels = rng.integers(-top + (format == "int4"), top, (33, 4, 32), endpoint=format == "int8")
    levels[..., 0] = -top  # the group's extreme, so that the scale is exactly 2^-6
    w = torch.from_numpy((levels * 2.0**-6).reshape(33, 128).astype(np.float32))
    activations = rng.integers(-127, 128, (19, 4, 32))
    activations[..., 0] = 127
    x = torch.from_numpy((activations * 2.0**-3).reshape(19, 128).astype(np.float32))
    exact = np.einsum("rgi,ngi->rn", activations, levels) * 2.0**-9
    np.testing.assert_array_equal(PackedWeight([w], format).multiply(x).numpy(), exact.astype(np.float32))


def widened(weight: PackedWeight) -> tuple[np.ndarray, np.ndarray]:
    """The bytes - 128 and the columns' scales that cpu/wide.h makes of a 4-bit weight, in plain numpy: [n, k padded] and [n]."""
    (n, k), arrays = weight.shape, weight.arrays()
    tiles, groups = -(-n // 16), -(-k // 32)
    data = arrays["data"].numpy().reshape(tiles, groups, 4, 16, 4)  # byte j of 16 columns holds k = 4j .. 4j + 3, and 16 above them
    levels = np.concatenate([data & 15, data >> 4], 2).transpose(0, 3, 1, 2, 4).reshape(tiles * 16, groups, 32)[:n].astype(np.int64)

    def a_column(name: str) -> np.ndarray:
        return arrays[name].float().numpy().reshape(tiles, groups, 16).transpose(0, 2, 1).reshape(tiles * 16, groups)[:n]

    scales = a_column("scales")
    lowest = a_column("minimums") if weight.format == "int4m" else scales * np.float32(-8)
    top = np.maximum(np.abs(lowest), np.abs(lowest + scales * np.float32(15))).max(1)
    inverse = np.divide(np.float32(127), top, out=np.zeros_like(top), where=top > 0)[:, None]
    away = lambda v: np.trunc(v + np.copysign(np.float32(0.5), v)).astype(np.int64)  # noqa: E731
    factor, offset = away(scales * inverse * np.float32(256)), away(lowest * inverse * np.float32(256)) + 128 * 256 + 128
    return ((levels * factor[..., None] + offset[..., None]) % 65536 // 256 - 128).reshape(len(top), -1), top * np.float32(1 / 127)


@settings(max_examples=40, deadline=None)
@given(
    format=st.sampled_from(("int4", "int4m")),
    n=st.integers(1, 50),
    k=st.integers(1, 600),
    rows=st.integers(1, 37),
    seed=st.integers(0, 2**31),
)
def test_wide_products_are_the_integers_that_they_claim(format: str, n: int, k: int, rows: int, seed: int) -> None:
    """Bytes, activations in blocks of 64 and exact integer sums: equal to numpy in float64 within the last additions' rounding."""
    generator = torch.Generator().manual_seed(seed)
    w, x = torch.randn(n, k, generator=generator), torch.randn(rows, k, generator=generator)
    w[0], x[0] = 1.0, -3.0  # all extremes: 255 x 127 in every product
    weight = PackedWeight([w], format)
    bytes_, columns = widened(weight)
    expected = np.zeros((rows, n))
    padded = np.zeros((rows, bytes_.shape[1]), np.float32)
    padded[:, :k] = x.numpy()
    for first in range(0, padded.shape[1], 64):
        block = padded[:, first : first + 64]
        biggest = np.abs(block).max(1, keepdims=True)
        scaled = block * np.divide(np.float32(127), biggest, out=np.zeros_like(biggest), where=biggest > 0)
        quants = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int64)
        expected += (quants @ bytes_[:, first : first + 64].T) * (biggest / np.float32(127)).astype(np.float64)
    np.testing.assert_allclose(weight.multiply(x, wide=True).numpy(), expected * columns, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("format", ["int4", "int4m"])
def test_wide_products_are_near_the_exact_ones(format: str) -> None:
    """Bytes round a weight to 1/254 of its column's largest and activations to 1/254 of a block's largest: a hundredth of the result."""
    weight, x = PackedWeight([torch.randn(96, 576)], format), torch.randn(70, 576)
    exact = weight.multiply(x)
    assert float((weight.multiply(x, wide=True) - exact).std() / exact.std()) < 0.015
    x[3, 5] = float("nan")
    x[4, 300] = float("inf")
    y = weight.multiply(x, wide=True)
    assert not y[3:5].isfinite().any()
    assert bool(y[:3].isfinite().all() & y[5:].isfinite().all())


@pytest.mark.parametrize("format", INTEGER)
def test_requantising_what_a_file_holds_is_lossless(format: str) -> None:
    """Weights that already lie on a format's grid (as dequantised Q4_0, Q4_1 or Q8_0 do) come back unchanged."""
    w = torch.randn(48, 96)
    once = PackedWeight([w], format).unpack()
    torch.testing.assert_close(PackedWeight([once], format).unpack(), once, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("format", "bound"), [("fp32", 0.0), ("fp16", 2.0**-11), ("int8", 0.5 / 127 * 1.01), ("int4m", 1 / 15 * 1.01), ("int4", 1 / 8 * 1.01)]
)
def test_quantisation_error_is_bounded_by_half_a_step(format: str, bound: float) -> None:
    w = torch.randn(40, 128)
    error = (PackedWeight([w], format).unpack() - w).abs().view(40, -1, 32)
    assert bool((error <= bound * w.view(40, -1, 32).abs().amax(-1, keepdim=True) + 1e-7).all())


@pytest.mark.parametrize("format", FORMATS)
def test_rows_are_batch_invariant(format: str) -> None:
    weight = PackedWeight([torch.randn(100, 160)], format)
    x = torch.randn(45, 160)
    together = weight.multiply(x)
    for rows in (slice(0, 1), slice(3, 8), slice(7, 29), slice(44, 45)):
        assert torch.equal(weight.multiply(x[rows]), together[rows])


@pytest.mark.parametrize("format", FORMATS)
def test_matrices_side_by_side_equal_each_alone(format: str) -> None:
    parts = [torch.randn(n, 64) for n in (50, 7, 96)]
    biases = [torch.randn(50), None, torch.randn(96)]
    x = torch.randn(5, 64)
    got = PackedWeight(parts, format, biases).multiply(x)
    expected = [PackedWeight([p], format).multiply(x) + (b if b is not None else 0) for p, b in zip(parts, biases, strict=True)]
    torch.testing.assert_close(got, torch.cat(expected, 1), rtol=0, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    w = torch.randn(4, 32)
    w[2, 5] = bad
    with pytest.raises(InputError, match="NaN or infinite"):
        PackedWeight([w], "int8")


@pytest.mark.parametrize("format", INTEGER)
@pytest.mark.parametrize("magnitude", [1e-44, 1e-37, 1e-30, 1e-12, 1e15, 1e30])
def test_activations_of_any_magnitude(format: str, magnitude: float) -> None:
    """From subnormal numbers, which count as 0, to the largest whose product fits."""
    weight = PackedWeight([torch.rand(20, 64) + 0.5], format)
    x = torch.rand(3, 64) + 0.5
    x[1] *= magnitude
    expected = torch.from_numpy(exact_dot(weight, x.numpy()))
    torch.testing.assert_close(weight.multiply(x).double(), expected, rtol=1e-5, atol=1e-35)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_activations_that_are_not_finite_show_in_their_row_alone(format: str, bad: float) -> None:
    weight = PackedWeight([torch.rand(20, 64) + 0.5], format)
    x = torch.randn(3, 64)
    x[1, 7] = bad
    y = weight.multiply(x)
    assert not torch.isfinite(y[1]).any()
    assert bool(torch.isfinite(y[[0, 2]]).all())


def test_half_conversion_is_exact_on_every_value() -> None:
    """fp16 storage keeps every half-precision number, subnormals included, on every instruction set."""
    every = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    every = every[torch.isfinite(every)].view(-1, 32)
    assert torch.equal(PackedWeight([every], "fp16").unpack(), every)


@pytest.mark.skipif(not Path("/proc/self/smaps").is_file(), reason="only Linux says what memory is")
def test_the_arena_may_have_huge_pages() -> None:
    """Asked for (hg), and private: shared memory (sh) gets none unless the administrator changes shmem_enabled."""
    memory, flags = Arena().take(1 << 20), set()
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            within = int(found[1], 16) <= memory.data_ptr() < int(found[2], 16)
        elif within and line.startswith("VmFlags:"):
            flags = set(line.split()[1:])
    assert "sh" not in flags
    assert "hg" in flags or not Path("/sys/kernel/mm/transparent_hugepage").is_dir()


def test_struct_sizes_agree() -> None:
    lib = cpu_library.library()
    assert lib is not None
    sizes = (ctypes.c_int32 * 6)()
    lib.arm_struct_sizes(sizes)
    assert sizes[0] == ctypes.sizeof(cpu_library.CWeight)


def test_a_product_that_does_not_fit_is_refused() -> None:
    weight = PackedWeight([torch.randn(20, 64)], "int8")
    for x in (torch.randn(3, 65), torch.randn(64), torch.randn(3, 64).double()):
        with pytest.raises(InputError, match=r"not float32 \[rows, 64\]"):
            weight.multiply(x)
    with pytest.raises(InputError, match="no wide product"):
        weight.multiply(torch.randn(3, 64), wide=True)
    with pytest.raises(InputError, match="no wide product"):
        PackedWeight([torch.randn(16, 8224)], "int4").multiply(torch.randn(3, 8224), wide=True)
