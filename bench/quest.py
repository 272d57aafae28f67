"""Decoding at a long context, all keys read or Quest's best pages: both sides ours, step by step in turn, in one process.

    python bench/quest.py [--context 16384] [--budget 1024] [--publish] [--force]     # wants a quiet machine; minutes, 7 GB of memory

SmolLM2's weights and shape; keys and values are random, so that the chosen pages lie scattered, and no prompt of that length
has to be computed. What is timed is whole iterations, from embedding to logits, of 1, 4 and 8 sequences.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quiet import quiet

from armillary.cluster.machine import describe
from armillary.kernels.cpu_step import DecoderStep
from armillary.kernels.seen import PAGE, Seen
from armillary.models.load import LoadedModel, load
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.native_forward import NativeForward

SIDES = (("none", "fp32"), ("none", "fp16"), ("int4", "fp32"), ("int4", "fp16"))  # weights, keys and values
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
BAR = 4.0


def measure(loaded: LoadedModel, weights: Any, kv: str, context: int, budget: int, batch: int, threads: int, steps: int) -> dict[str, Any]:
    """Median seconds of a dense iteration and of one that selects pages, and of attention (with the selection) in each."""
    blocks = -(-(context + steps) // PAGE)
    options = {"quantisation": weights, "kv_dtype": DTYPES[kv], "threads": threads, "seen": Seen(pages=budget // PAGE, dense_layers=2)}
    quest = NativeForward(loaded.weights, num_blocks=batch * blocks, block_size=PAGE, **options)
    cache, dense = quest.cache, copy.copy(quest)
    bounds, cache.bounds = cache.bounds, None  # the same keys and values in the same memory, without what selection costs
    dense.step = DecoderStep(quest.step.model, cache, threads)
    cache.bounds = bounds
    generator = torch.Generator().manual_seed(0)
    for layer in range(cache.keys.shape[0]):
        for pool in (cache.keys, cache.values):
            pool[layer].copy_(torch.randn(pool.shape[1], generator=generator))
        cache.bound_pages(layer, 0, batch * blocks * PAGE)
    forward = {"dense": dense, "quest": quest}
    tables = [range(i * blocks, (i + 1) * blocks) for i in range(batch)]
    seconds: dict[str, list[float]] = {"dense": [], "quest": []}
    attention: dict[str, list[float]] = {"dense": [], "quest": []}
    for step in range(steps):
        for name, side in forward.items():
            spans = [Span(context + step, 1, table) for table in tables]
            before, start = side.step.phases(), time.perf_counter()
            side.logits(FlatBatch([17 + step] * batch, [context + step] * batch, spans, range(batch)))
            seconds[name].append(time.perf_counter() - start)
            after = side.step.phases()
            attention[name].append(sum(after[phase] - before[phase] for phase in ("select", "attention")) / 1e9)
    middle = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    part = {name: statistics.median(values[2:]) for name, values in attention.items()}
    return {"weights": weights, "kv": kv, "batch": batch, "seconds": middle, "attention": part}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| weights | keys and values | sequences | dense, tok/s | Quest, tok/s | times as fast | attention alone | bar | met |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        dense, quest = row["seconds"]["dense"], row["seconds"]["quest"]
        ratio, alone = dense / quest, row["attention"]["dense"] / row["attention"]["quest"]
        lines.append(
            f"| {'fp32' if row['weights'] == 'none' else row['weights']} | {row['kv']} | {row['batch']} | {row['batch'] / dense:,.1f} "
            f"| {row['batch'] / quest:,.1f} | {ratio:.2f} | {alone:.2f} | {BAR:g} | {'yes' if ratio >= BAR else 'no'} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--budget", type=int, default=1024, help="tokens that a query reads")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--publish", action="store_true", help="write results/quest.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    rows = [
        measure(loaded, weights, kv, options.context, options.budget, batch, options.threads, options.steps)
        for batch in (1, 4, 8)
        for weights, kv in SIDES
    ]
    page = (
        f"# Decoding at a long context\n\n{describe().cpu}, {options.threads} threads, SmolLM2-135M's shape after {options.context:,} tokens,"
        f" {options.budget:,} of them read by Quest in all layers but two. `python bench/quest.py`; load average {before:.2f} before.\n\n{table(rows)}\n"
    )
    print(page)
    if options.publish:
        (Path(__file__).resolve().parent / "results" / "quest.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
