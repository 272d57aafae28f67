"""Product curves: every kind that this machine has, at the shapes that were asked for."""

from __future__ import annotations

import pytest

from armillary.kernels import cpu_library
from armillary.kernels.product_rates import FORMATS, Curve, curves, measure_products


def test_curves_are_torch_on_one_and_all_threads_and_our_formats() -> None:
    names = [(curve.library, curve.dtype, curve.threads) for curve in curves(2)]
    assert names[:2] == [("torch", "fp32", 1), ("torch", "fp32", 2)]
    ours = [("armillary", format, 1) for format in FORMATS]
    assert names[2:] == (ours if cpu_library.available() else [])
    assert len(curves(1)) == len(names) - 1


@pytest.mark.parametrize("curve", [Curve("torch", "fp32", 1), *(Curve("armillary", format, 1) for format in FORMATS)], ids=str)
def test_a_curve_has_a_rate_a_shape_and_number_of_tokens(curve: Curve) -> None:
    if curve not in curves(1):
        pytest.skip("the native kernels need g++")
    rates = list(measure_products(curve, shapes=((64, 32), (32, 64)), tokens=(1, 5), seconds=0.001))
    assert [(rate.n, rate.k, rate.m) for rate in rates] == [(64, 32, 1), (64, 32, 5), (32, 64, 1), (32, 64, 5)]
    assert {(rate.library, rate.dtype, rate.threads) for rate in rates} == {(curve.library, curve.dtype, 1)}
    assert all(rate.flops > 0 for rate in rates)
