"""The card: what it lacks for these benches, what it can do at most, and how long something takes on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from importlib import util


def lacking() -> str | None:
    """Why nothing can be measured here, with what it needs; None where it can."""
    if util.find_spec("triton") is None:
        return "needs Triton: pip install 'armillary[gpu]' (Linux)"
    import torch

    if not torch.cuda.is_available():
        return f"needs a GPU that PyTorch can use (CUDA or ROCm), and torch {torch.__version__} sees none; --dry-run prints the cases"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "measures nothing in Triton's interpreter: unset TRITON_INTERPRET"
    return None


@dataclass(frozen=True)
class Limits:
    """The roofline, measured in this run."""

    bandwidth: float  # bytes/s of a copy, read and written bytes counted
    flops: float  # FLOP/s of a square product in fp16 with fp32 sums


def limits() -> Limits:
    import torch

    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy = best_seconds(lambda: target.copy_(source))
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    return Limits(2 * source.nbytes / copy, 2 * size**3 / best_seconds(lambda: a @ b))


def best_seconds(run: Callable[[], object]) -> float:
    """The shortest of the runs that fit into 0.2 s, after 0.05 s of warm-up, by the card's own clock (events). The second-level
    cache is overwritten before each, so that weights and keys come from memory, as they do in a model."""
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=200, return_mode="min")) / 1e3


def about() -> str:
    """Name, versions and clocks, for who wants to judge the numbers."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    found = [
        f"{properties.name}, {properties.multi_processor_count} multiprocessors, {properties.total_memory / 1e9:.0f} GB",
        f"torch {torch.__version__}, triton {triton.__version__}",
    ]
    with suppress(OSError, subprocess.SubprocessError):
        query = ["nvidia-smi", "--id=0", "--query-gpu=clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit", "--format=csv,noheader"]
        clocks = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
        found.append(f"SM clock, its maximum, memory clock, power, its limit: {clocks}")
    return "; ".join(found)
