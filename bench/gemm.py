"""The machine's GEMM rate: what the fastest library here makes of large fp32 products. The limit of a training step.

python -m gemm THREADS      # from the folder bench
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import torch
from peers.workload import MARK

SIZES = (1024, 2048, 3072)  # square products: none of the training's own shapes, for these are what is judged


def measure(threads: int, seconds: float = 1.0) -> dict[str, float]:
    """FLOP/s of each library at its best size."""
    torch.set_num_threads(threads)
    rates: dict[str, float] = {}
    with torch.inference_mode():
        for size in SIZES:
            a, b, out = (torch.randn(size, size) for _ in range(3))
            runs: dict[str, Callable[[], object]] = {"torch.mm": lambda a=a, b=b, out=out: torch.mm(a, b, out=out)}
            if torch.backends.mkldnn.is_available():
                packed = torch.ops.mkldnn._reorder_linear_weight(b, None)
                runs["oneDNN, packed"] = lambda a=a, packed=packed: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")
            for name, run in runs.items():
                rates[name] = max(rates.get(name, 0.0), 2 * size**3 / best(run, seconds))
    return rates


def best(run: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest run, after one that warms up."""
    run()
    fastest, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        run()
        fastest = min(fastest, time.perf_counter() - start)
    return fastest


if __name__ == "__main__":
    sys.stdout.write(f"\n{MARK}{json.dumps(measure(int(sys.argv[1])))}\n")
