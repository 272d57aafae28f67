"""What this machine's arithmetic and memory really do, measured with torch: the limits that a kernel's speed is compared with."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from armillary.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Rates:
    """Best of several runs with torch's current number of threads."""

    threads: int
    gemm: float  # fp32 FLOP/s, a square product of 1024
    memory_read: float  # bytes/s, a buffer far larger than the caches


def measure(seconds: float = 0.6, buffer_bytes: int = 256_000_000) -> Rates:
    """Measure both rates in about `2 * seconds`, half of it each, beside the set-up. Other work on the machine lowers them."""
    import torch

    if not 0 < seconds <= 60 or not 1_000_000 <= buffer_bytes <= 16_000_000_000:
        raise InputError(f"cannot measure for {seconds} s on {buffer_bytes} bytes", "give up to 60 s, and 1 MB to 16 GB")
    size = 1024
    with torch.inference_mode():
        a, b, out = (torch.ones(size, size) for _ in range(3))
        gemm = best_time(lambda: torch.mm(a, b, out=out), seconds)
        rows = buffer_bytes // (4 * 4096)
        matrix, vector, product = torch.ones(rows, 4096), torch.ones(4096), torch.ones(rows)
        # Two readers, for neither is the faster one everywhere: a matrix-vector product and a sum.
        read = min(best_time(lambda: torch.mv(matrix, vector, out=product), seconds / 2), best_time(matrix.sum, seconds / 2))
    return Rates(torch.get_num_threads(), 2 * size**3 / gemm, matrix.numel() * 4 / read)


def best_time(run: Callable[[], object], seconds: float) -> float:
    """The shortest of the runs that fit into `seconds` (at least three, after one that warms up), in seconds."""
    run()
    best, deadline, runs = float("inf"), time.perf_counter() + seconds, 0
    while runs < 3 or time.perf_counter() < deadline:
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
        runs += 1
    return best
