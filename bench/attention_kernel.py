"""How close one core's attention comes to its fused multiply-add peak, measured in the same minute: `python bench/attention_kernel.py`.

Attention of SmolLM2-135M's shape (9 heads, 3 of keys and values, 64 components) alone, on one thread, best of many runs; the
peak is a loop of multiply-adds that never leaves registers. A causal prompt of T tokens costs 2 x heads x 64 x T (T + 1)
operations a layer; a decoding token's limit is the bytes of keys and values, which stay in the cache's higher levels here.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch

from armillary.core import native
from armillary.kernels import cpu_library
from armillary.kernels.cpu_library import CSequence
from armillary.kernels.cpu_step import CACHE_DTYPES, StepCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK = 9, 3, 64, 16


def best(call: Callable[[], object], seconds: float) -> float:
    """The fastest of as many runs as fit, and of at least 30."""
    fastest, until, runs = float("inf"), time.perf_counter() + seconds, 0
    while time.perf_counter() < until or runs < 30:
        start = time.perf_counter()
        call()
        fastest, runs = min(fastest, time.perf_counter() - start), runs + 1
    return fastest


def peak(seconds: float) -> float:
    """Fused multiply-adds of this core, in FLOP/s."""
    path = native.build("fma_peak", [Path(__file__).parent / "fma_peak.cpp"], (*cpu_library.flags(), f"-I{cpu_library.FOLDER}"))
    lib = ctypes.CDLL(str(path))
    lib.arm_fma_flops.argtypes, lib.arm_fma_flops.restype = [ctypes.c_long], ctypes.c_double
    rounds = 50_000
    return float(lib.arm_fma_flops(1)) * rounds / best(lambda: lib.arm_fma_flops(rounds), seconds)


def attend(dtype: torch.dtype, start: int, count: int, seconds: float) -> float:
    """Seconds to store and attend `count` tokens that follow `start` others."""
    blocks = -(-(start + count) // BLOCK)
    q, k, v = (torch.randn(count, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    cache, table, out = StepCache(1, blocks, BLOCK, KV_HEADS, HEAD_DIM, dtype), torch.randperm(blocks).int(), torch.zeros_like(q)
    struct, sequence, lib = cache.struct(0), CSequence(table.data_ptr(), start, count, 0), cpu_library.require()
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (q, k, v, out)]
    scale, softcap = ctypes.c_float(HEAD_DIM**-0.5), ctypes.c_float(0.0)
    return best(
        lambda: lib.arm_attention(ctypes.byref(struct), ctypes.byref(sequence), HEADS, scale, softcap, 0, None, *pointers, None), seconds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    seconds = parser.parse_args().seconds
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("cache     prompt 512, a layer     of the peak   token at 512   token at 4,096")
    for dtype in CACHE_DTYPES:
        limit, prefill = peak(seconds), attend(dtype, 0, 512, seconds)
        rate = 2 * HEADS * HEAD_DIM * 512 * 513 / prefill
        decode = [attend(dtype, start, 1, seconds) * 1e6 for start in (512, 4096)]
        print(
            f"{str(dtype)[6:]:8}  {prefill * 1e3:.3f} ms {rate / 1e9:4.0f} GFLOP/s  {rate / limit:6.0%} of {limit / 1e9:.0f}"
            f"  {decode[0]:9.1f} us  {decode[1]:12.1f} us",
            flush=True,
        )


if __name__ == "__main__":
    main()
