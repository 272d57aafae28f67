"""Products with 4- and 8-bit weights on a GPU, beside cuBLAS in 16 bits and the card's roofline, all in one run.

    python bench/gpu/quantised_linear.py --dry-run      the cases, with the bytes and FLOPs that they need; no GPU
    python bench/gpu/quantised_linear.py --publish      measure, and write bench/results/gpu_quantised_linear.{json,md}

The peer is PyTorch's product (cuBLAS) with the same weight in the activations' 16 bits: it reads two to four times the bytes
and widens nothing. Every result is compared with float64 before anything is timed.
"""

from __future__ import annotations

import sys

import card
from cases import LINEAR, Case, LinearCase
from report import Result, main


def measure(case: Case, device: str = "cuda") -> Result:
    import torch

    from armillary.kernels.gpu.quantised_linear import quantise, quantised_linear, reference_quantised_linear

    assert isinstance(case, LinearCase)
    torch.manual_seed(0)
    dtype = getattr(torch, case.dtype)
    weight = quantise(torch.randn(case.n, case.k, device=device) * case.k**-0.5, case.format)
    x = torch.randn(case.m, case.k, device=device).to(dtype)
    widened = weight.dequantise()
    exact = reference_quantised_linear(x, weight)
    # A weight and the result are rounded once each; the interpreter cuts where the hardware rounds, hence a whole eps.
    eps = torch.finfo(dtype).eps
    allowed = (x.double().abs() @ widened.double().abs().T) * (eps + case.k * 2.0**-24) + exact.abs() * eps
    error = float(((quantised_linear(x, weight).double() - exact).abs() / allowed).max())
    if not error <= 1:
        raise SystemExit(f"{case.name}: wrong by {error:.1f} times what its dtype allows, not timed")
    transposed = widened.to(dtype).T
    peers: dict[str, float | None] = {"cuBLAS 16-bit": card.best_seconds(lambda: x @ transposed)}
    return Result(case.name, card.best_seconds(lambda: quantised_linear(x, weight)), peers, error)


if __name__ == "__main__":
    sys.exit(main("quantised_linear", __doc__, LINEAR, measure))
