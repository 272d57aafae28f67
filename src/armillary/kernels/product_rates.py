"""What matrix products really reach on this machine, by library, type of the weights, threads and shape: the curves that calibration keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from armillary.cluster.measure import best_time
from armillary.cluster.memory_rates import torch_threads
from armillary.cluster.profile import ProductRate
from armillary.kernels import cpu_library
from armillary.kernels.packed_weight import Format, PackedWeight

TOKENS: Final = (1, 4, 16, 64, 256)
SHAPES: Final = ((1024, 1024), (4096, 1024), (4096, 4096))  # [n, k]: within the caches, at their edge, far beyond them
FORMATS: Final[tuple[Format, ...]] = ("fp32", "fp16", "int8", "int4")


@dataclass(frozen=True, slots=True)
class Curve:
    """One library, type and number of threads."""

    library: str
    dtype: str
    threads: int

    def __str__(self) -> str:
        return f"{self.library}'s {self.dtype} products on {self.threads} thread{'s' if self.threads != 1 else ''}"


def curves(threads: int) -> tuple[Curve, ...]:
    """What can be measured here: torch in fp32 on one thread and on all, our packed weights on one (where they can be compiled)."""
    torchs = tuple(Curve("torch", "fp32", count) for count in sorted({1, threads}))
    return torchs + (tuple(Curve("armillary", format, 1) for format in FORMATS) if cpu_library.available() else ())


def measure_products(
    curve: Curve, shapes: Sequence[tuple[int, int]] = SHAPES, tokens: Sequence[int] = TOKENS, seconds: float = 0.12
) -> Iterator[ProductRate]:
    """One rate a shape and number of tokens, each the best of what fits into `seconds` (three runs at least)."""
    generator = torch.Generator().manual_seed(0)
    with torch_threads(curve.threads), torch.inference_mode():
        for n, k in shapes:
            multiply = _product(curve, torch.randn(n, k, generator=generator))
            for m in tokens:
                x = torch.randn(m, k, generator=generator)
                best = best_time(partial(multiply, x), seconds)
                yield ProductRate(library=curve.library, dtype=curve.dtype, threads=curve.threads, m=m, n=n, k=k, seconds=best)


def _product(curve: Curve, weight: Tensor) -> Callable[[Tensor], Tensor]:
    if curve.library == "torch":
        return lambda x: torch.nn.functional.linear(x, weight)
    format = next(each for each in FORMATS if each == curve.dtype)
    return PackedWeight([weight], format).multiply
