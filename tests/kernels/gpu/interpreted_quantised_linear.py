"""Run by test_interpreter.py under TRITON_INTERPRET=1: rounding, layout and products of the GPU's integer weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.gpu.quantised_linear import (
    Format,
    QuantisedWeight,
    choose_tiles,
    pack,
    quantise,
    quantised_linear,
    reference_quantised_linear,
)

FORMATS: tuple[Format, ...] = ("int8", "int4", "int4m")
CENTRE = {"int8": 128, "int4": 8, "int4m": 0}


def assert_right(ours: Tensor, x: Tensor, weight: QuantisedWeight) -> None:
    """Within one rounding of each weight and of the result to the dtype of x, and of sums in fp32 (Higham 2002, eq. 3.5)."""
    exact = reference_quantised_linear(x, weight)
    terms = x.double().abs() @ weight.dequantise().double().abs().T
    unit = torch.finfo(x.dtype).eps / (
        2 if x.dtype == torch.float16 else 1
    )  # Triton 3.9's interpreter cuts to bfloat16, the hardware rounds
    bound = terms * (unit + (x.shape[1] + 2) * 2.0**-24) + exact.abs() * unit * 1.01 + 1e-7
    assert ours.dtype == x.dtype
    assert bool(((ours.double() - exact).abs() <= bound).all())


@settings(max_examples=50)
@given(
    seed=st.integers(0, 1 << 30),
    m=st.sampled_from((1, 2, 3, 4, 5, 16, 17, 33)),
    n=st.sampled_from((1, 15, 16, 70, 130)),
    k=st.sampled_from((1, 31, 32, 33, 64, 96, 200, 320)),
    format=st.sampled_from(FORMATS),
    dtype=st.sampled_from((torch.float16, torch.bfloat16)),
    splits=st.sampled_from((None, 1, 3)),
)
def test_equals_the_float64_product_of_the_widened_weight(
    seed: int, m: int, n: int, k: int, format: Format, dtype: torch.dtype, splits: int | None
) -> None:
    torch.manual_seed(seed)
    weight = quantise(torch.randn(n, k) * 0.1 + 0.02, format)
    x = torch.randn(m, k).to(dtype)
    tiles = choose_tiles(m, n, k, 1)
    assert_right(quantised_linear(x, weight, tiles if splits is None else replace(tiles, splits=splits)), x, weight)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("m", [1, 4, 5])
def test_whole_numbers_are_exact(format: Format, m: int) -> None:
    """Extreme levels against extreme activations: every product and sum is a whole number that fp32 and the weights' fp16 hold."""
    levels = torch.tensor([0, 255 if format == "int8" else 15], dtype=torch.uint8).repeat(24, 96)[:, :160]
    minimums = torch.full((24, 5), -3.0).half() if format == "int4m" else None
    weight = pack(levels, torch.ones(24, 5).half(), minimums, format)
    x = torch.tensor([4.0, -4.0, 4.0]).repeat(m, 54)[:, :160].half()
    assert torch.equal(quantised_linear(x, weight), reference_quantised_linear(x, weight).half())


@pytest.mark.parametrize("format", FORMATS)
def test_rounding_is_that_of_the_cpu_kernels_bit_for_bit(format: Format) -> None:
    from armillary.kernels import cpu_library, packed_weight

    try:
        cpu_library.require()
    except Exception as reason:
        pytest.skip(f"no CPU kernels here: {reason}")
    torch.manual_seed(0)
    weight = torch.randn(50, 200)
    weight[0, :32] = 0.0
    weight[1, :32] = 0.5
    weight[2, 32:64] = torch.linspace(-1, 1, 32)
    assert torch.equal(quantise(weight, format).dequantise(), packed_weight.PackedWeight([weight], format).unpack())


@pytest.mark.parametrize("format", FORMATS)
def test_levels_come_back_and_take_the_bytes_that_they_should(format: Format) -> None:
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256 if format == "int8" else 16, (10, 96), generator=generator).to(torch.uint8)
    scales = torch.rand(10, 3, generator=generator).half()
    minimums = torch.rand(10, 3, generator=generator).half() if format == "int4m" else None
    weight = pack(levels, scales, minimums, format)
    expected = (levels.float() - CENTRE[format]) * scales.float().repeat_interleave(32, 1)
    if minimums is not None:
        expected += minimums.float().repeat_interleave(32, 1)
    assert torch.equal(weight.dequantise(), expected)
    # 96 inputs are three groups, padded to two pairs.
    assert weight.nbytes == 10 * 128 * (8 if format == "int8" else 4) // 8 + 10 * 4 * 2 * (2 if format == "int4m" else 1)


def test_rows_of_x_lie_anywhere_and_may_be_none() -> None:
    torch.manual_seed(0)
    weight = quantise(torch.randn(20, 64), "int4")
    part = torch.randn(6, 130).half()[:, 66:]  # its rows are 130 apart
    assert torch.equal(quantised_linear(part, weight), quantised_linear(part.contiguous(), weight))
    assert torch.equal(quantised_linear(part.reshape(2, 3, 64), weight), quantised_linear(part, weight).view(2, 3, 20))
    assert quantised_linear(part[:0], weight).shape == (0, 20)


@pytest.mark.parametrize("m", [3, 8])
def test_nan_activations_give_nan_in_their_row_alone(m: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(m, 64).half()
    x[1, 5] = float("nan")
    out = quantised_linear(x, quantise(torch.randn(20, 64), "int4m"))
    assert out[1].isnan().all()
    assert out[[0, *range(2, m)]].isfinite().all()


def test_bad_input_is_refused_by_name() -> None:
    weight = quantise(torch.randn(4, 64), "int4")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(InputError, match="NaN or infinite"):
            quantise(torch.tensor([[1.0, bad]]), "int8")
    with pytest.raises(InputError, match="too large for the fp16 scale"):
        quantise(torch.full((1, 32), 1e7), "int4")
    with pytest.raises(InputError, match="no weight format is called 'int5'"):
        quantise(torch.ones(1, 32), "int5")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both at least 1"):
        quantise(torch.ones(0, 32), "int4")
    with pytest.raises(InputError, match="4 bits hold 0 to 15"):
        pack(torch.full((1, 32), 16, dtype=torch.uint8), torch.ones(1, 1), None, "int4")
    with pytest.raises(InputError, match="minimums: none"):
        pack(torch.ones(1, 32, dtype=torch.uint8), torch.ones(1, 1), None, "int4m")
    with pytest.raises(InputError, match=r"scales: \[1, 2\]"):
        pack(torch.ones(1, 32, dtype=torch.uint8), torch.ones(1, 2), None, "int4")
    with pytest.raises(InputError, match="give x with 64 columns"):
        quantised_linear(torch.ones(2, 32).half(), weight)
    with pytest.raises(InputError, match=r"x is torch\.float32"):
        quantised_linear(torch.ones(2, 64), weight)
    with pytest.raises(InputError, match="tiles of 2 rows for 3 rows"):
        quantised_linear(torch.ones(3, 64).half(), weight, choose_tiles(2, 4, 64, 1))
