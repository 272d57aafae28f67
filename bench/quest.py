"""Decoding at a long context, all keys read or Quest's best pages: both sides ours, step by step in turn, in one process.

    python bench/quest.py [--context 16384] [--budget 1024] [--publish] [--force]     # wants a quiet machine; minutes, 7 GB of memory

SmolLM2's weights and shape; keys and values are random, so that the chosen pages lie scattered, and no prompt of that length
has to be computed. What is timed is whole iterations, from embedding to logits, of 1, 4 and 8 sequences.

"At most" is what no way of selecting these pages could exceed: the products with the weights take what they take, and
attention takes at least the share of the dense side's time that its bytes are of all keys' and values' (bounds, chosen pages,
dense layers), since the dense side does nothing but read them.
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
from armillary.kernels.cpu_step import DecoderStep, cache_row_bytes
from armillary.kernels.seen import PAGE, Seen, page_bound_bytes
from armillary.models.load import LoadedModel, load
from armillary.serve.config import EngineConfig
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.native_forward import NativeForward

SIDES = (("none", "fp32"), ("none", "fp16"), ("int4", "fp32"), ("int4", "fp16"))  # weights, keys and values
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}
BAR = 4.0


def policy(budget: int) -> Seen:
    """What queries read with `--kv-policy quest` and nothing else."""
    return EngineConfig(kv_policy="quest", kv_budget=budget, backend="native").kv.seen


def measure(loaded: LoadedModel, weights: Any, kv: str, context: int, budget: int, batch: int, threads: int, steps: int) -> dict[str, Any]:
    """Median seconds of an iteration of both sides, and of its phases; and what share of the bytes Quest's attention reads."""
    seen = policy(budget)
    blocks = -(-(context + steps) // PAGE)
    options = {"quantisation": weights, "kv_dtype": DTYPES[kv], "threads": threads, "seen": seen}
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
    phases: dict[str, list[dict[str, float]]] = {"dense": [], "quest": []}
    for step in range(steps):
        for name, side in forward.items():
            spans = [Span(context + step, 1, table) for table in tables]
            before, start = side.step.phases(), time.perf_counter()
            side.logits(FlatBatch([17 + step] * batch, [context + step] * batch, spans, range(batch)))
            seconds[name].append(time.perf_counter() - start)
            after = side.step.phases()
            phases[name].append({phase: (after[phase] - before[phase]) / 1e9 for phase in ("select", "attention")})
    middle = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    part = {name: {key: statistics.median(one[key] for one in values[2:]) for key in values[0]} for name, values in phases.items()}
    layers, head_dim = cache.keys.shape[0], cache.head_dim
    page = 2 * PAGE * cache_row_bytes(head_dim, cache.dtype)  # of one head
    selected = page_bound_bytes(head_dim) / page + seen.pages * PAGE / context
    share = (seen.dense_layers + (layers - seen.dense_layers) * selected) / layers
    return {"weights": weights, "kv": kv, "batch": batch, "seconds": middle, "phases": part, "share": share}


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| weights | keys and values | sequences | dense, ms: rest + attention | Quest, ms: rest + selection + attention "
        "| times as fast | at most | attention alone | at most | bar | met |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        dense, quest = row["seconds"]["dense"], row["seconds"]["quest"]
        read, select, part = row["phases"]["dense"]["attention"], row["phases"]["quest"]["select"], row["phases"]["quest"]["attention"]
        ratio, alone, bound = dense / quest, read / (select + part), dense / (dense - read + read * row["share"])
        ours = f"{1e3 * (quest - select - part):.1f} + {1e3 * select:.1f} + {1e3 * part:.1f}"
        lines.append(
            f"| {'fp32' if row['weights'] == 'none' else row['weights']} | {row['kv']} | {row['batch']} "
            f"| {1e3 * (dense - read):.1f} + {1e3 * read:.1f} | {ours} | {ratio:.2f} | {bound:.2f} | {alone:.2f} | {1 / row['share']:.2f} "
            f"| {BAR:g} | {'yes' if ratio >= BAR else 'no' if bound >= BAR else 'cannot be'} |"
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
        f" {options.budget:,} of them read by Quest in all layers but {policy(options.budget).dense_layers}. `python bench/quest.py`; load average {before:.2f} before.\n\n{table(rows)}\n"
    )
    print(page)
    if options.publish:
        (Path(__file__).resolve().parent / "results" / "quest.md").write_text(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
