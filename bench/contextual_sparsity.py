"""What a feed-forward layer costs of which a few neurons are computed: the time of all of them times the density, within 30 %.

    python bench/contextual_sparsity.py --publish [--force]     # wants a quiet machine; half a minute

One token through a layer of 8,192 neurons of 2,048 numbers, 201 MB, which no cache holds: the density of a row is what of the memory is read.
The layer is SwiGLU, so that no neuron is left at zero and the dense layer reads everything. torch's dense layer stands beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch.nn import functional

from armillary.cluster.machine import describe
from armillary.kernels.active_rows import active_rows
from armillary.kernels.gated import gated

HERE = Path(__file__).resolve().parent
QUIET = 0.5  # load average above which timings mean nothing
NEURONS, WIDTH = 8192, 2048
DENSITIES = (1.0, 0.5, 0.25, 0.125, 0.05)
WITHIN = 0.3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads of both sides (default: all cores)")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each density, of which the best counts")
    parser.add_argument("--publish", action="store_true", help="write bench/results/contextual_sparsity.{json,md}; wants a quiet machine")
    parser.add_argument("--force", action="store_true", help="publish although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if before > QUIET and options.publish and not options.force:
        print(f"not measured: the load average is {before:.2f}; wait for a quiet machine, or --force", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    found = measure(options.repeats)
    dense, rows = found["dense torch"], []
    for density in DENSITIES:
        seconds = found[f"{density:g}"]
        ratio = found["1"] / seconds * density
        met = abs(1 / ratio - 1) <= WITHIN
        rows.append((density, seconds, ratio, met))
    text = page(rows, dense, options.threads, before)
    print(text)
    if options.publish:
        (HERE / "results" / "contextual_sparsity.md").write_text(text)
        (HERE / "results" / "contextual_sparsity.json").write_text(json.dumps({"seconds": found, "load": before}, indent=1) + "\n")
    return 0 if all(met for *_, met in rows) else 1


def measure(repeats: int) -> dict[str, float]:
    """Best seconds of each density, and of torch's dense layer; the sides take turns, so that none has the quieter minute."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, WIDTH, generator=generator) / WIDTH**0.5
    gate, up, down = (torch.randn(NEURONS, WIDTH, generator=generator) for _ in range(3))
    order = torch.randperm(NEURONS, generator=generator)
    # Sorted, as predictors name them: neighbouring rows are read one after the other.
    chosen = {density: order[: round(density * NEURONS)].sort().values.int() for density in DENSITIES}
    sides: dict[str, Callable[[], object]] = {
        f"{density:g}": lambda rows=rows: active_rows(x, rows, gate, up, down, "silu") for density, rows in chosen.items()
    }
    transposed = down.T.contiguous()
    sides["dense torch"] = lambda: functional.linear(gated(functional.linear(x, gate), functional.linear(x, up)), transposed)
    best = dict.fromkeys(sides, float("inf"))
    with torch.inference_mode():
        for _ in range(repeats):
            for name, side in sides.items():
                begin = time.perf_counter()
                side()
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def page(rows: list[tuple[float, float, float, bool]], dense: float, threads: int, load: float) -> str:
    size = 3 * NEURONS * WIDTH * 4
    lines = [
        "# A feed-forward layer of which a few neurons are computed",
        "",
        f"{describe().cpu}, {threads} threads, one token, {NEURONS:,} neurons of {WIDTH:,} numbers ({size / 1e6:,.0f} MB of fp32 weights), SwiGLU.",
        f"`python bench/contextual_sparsity.py`, {datetime.now(UTC):%Y-%m-%d}. Load average {load:.2f} before, {os.getloadavg()[0]:.2f} after.",
        f"torch's dense layer takes {1e3 * dense:.2f} ms.",
        "",
        "| density | time | GB/s of weights | times as fast as all neurons | over 1 / density | within 30 % |",
        "|---:|---:|---:|---:|---:|---|",
    ]
    for density, seconds, ratio, met in rows:
        lines.append(
            f"| {density:.0%} | {1e3 * seconds:.2f} ms | {density * size / seconds / 1e9:.1f} | {ratio / density:.2f} | {ratio:.2f} | {'yes' if met else 'no'} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
