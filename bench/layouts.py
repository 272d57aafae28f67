"""The table of layouts: each trains the same small models as one process does, and its final differences are printed.

Correctness, not speed: the numbers do not depend on what else the machine does. A layout runs as threads of one process
(torch's threaded process group), as simulated ranks (LocalTensor) or as real processes over gloo.

    python bench/layouts.py [--write bench/results/layouts.md]
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from armillary.train.parallel.curve import FAMILIES, Curve, layout_curve, simulated_curves, single_curve, zero_curve
from armillary.train.parallel.launch import spawn
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.rank_threads import run_ranks

STEPS = 4
UNEVEN = 53  # a vocabulary that nothing divides
THREADS = ("dp_replicate=8", "dp_shard=8", "dp_shard=8,zero_stage=2", "dp_replicate=2,dp_shard=4", "dp_shard=2,tp=2")
THREADS += ("dp_replicate=2,tp=4", "dp_replicate=2,dp_shard=2,tp=2", "dp_replicate=2,dp_shard=2,tp=2,sequence_parallel")
SIMULATED = ("dp_replicate=8", "tp=8", "tp=8,sequence_parallel", "dp_replicate=4,tp=2", "dp_replicate=2,tp=4,sequence_parallel")
PROCESSES = {
    2: ("dp_replicate=2", "dp_shard=2,zero_stage=1", "dp_shard=2,zero_stage=2", "dp_shard=2", "tp=2", "tp=2,sequence_parallel"),
    4: (
        "dp_replicate=4",
        "dp_shard=4",
        "dp_replicate=2,dp_shard=2",
        "dp_shard=2,tp=2",
        "dp_shard=2,tp=2,sequence_parallel",
        "dp_replicate=2,tp=2",
        "tp=4",
    ),
}


def rows() -> Iterator[tuple[str, str, str, Curve, Curve]]:
    """(ranks as, layout, model, its curve, one process's curve)."""
    for family in FAMILIES:
        for text in THREADS if family == "everything" else ("dp_shard=8", "dp_shard=2,tp=2"):
            layout = Layout.parse(text)
            work = partial(thread_rank, layout, family)
            yield (
                "8 threads" if layout.world == 8 else f"{layout.world} threads",
                text,
                family,
                run_ranks(layout.world, work)[0],
                reference(family),
            )
    for stage in (1, 2, 3):
        work = partial(zero_rank, stage)
        yield "8 threads", f"reference executor, ZeRO-{stage}", "everything", run_ranks(8, work)[0], reference("everything")
    for text in SIMULATED:
        layout = Layout.parse(text)
        one, many = simulated_curves(layout, FAMILIES["everything"], microbatches=max(2, layout.dp), steps=STEPS)
        yield f"{layout.world} simulated", text, "everything", many, one
    for world, texts in PROCESSES.items():
        curves = spawn(world, process_rank, texts)[0]
        for text in texts:
            yield f"{world} processes", text, "everything, vocabulary 53", curves[text], process_reference()


def thread_rank(layout: Layout, family: str, rank: int) -> Curve:
    return layout_curve(layout, FAMILIES[family], microbatches=8, steps=STEPS, replicas="buckets")


def zero_rank(stage: int, rank: int) -> Curve:
    return zero_curve(stage, rank, FAMILIES["everything"], microbatches=8, steps=STEPS)


def process_rank(rank: int, texts: tuple[str, ...]) -> dict[str, Curve]:
    config = replace(FAMILIES["everything"], vocab_size=UNEVEN)
    return {text: layout_curve(Layout.parse(text), config, microbatches=8, steps=STEPS) for text in texts}


@cache
def reference(family: str) -> Curve:
    return single_curve(FAMILIES[family], microbatches=8, steps=STEPS)


@cache
def process_reference() -> Curve:
    return single_curve(replace(FAMILIES["everything"], vocab_size=UNEVEN), microbatches=8, steps=STEPS)


def table() -> str:
    lines = [
        f"# One curve: {STEPS} steps of AdamW in fp32 under every layout, beside one process",
        "",
        f"`python bench/layouts.py` with torch {torch.__version__}. Two layers; `everything` has grouped and normed heads, biases, windows, soft caps,",
        "sandwich norms and a tied head. 8 micro-batches a step (simulated ranks: one or two a data-parallel rank), learning rate 1e-3.",
        "Loss in nats a token; the gradient's norm relative. Bits: every loss, and every parameter after the last step.",
        "",
        "| ranks | layout | model | last loss | max loss difference | max norm difference | max parameter difference | same bits |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for ranks, text, family, curve, expected in rows():
        norms = [abs(a / b - 1) for a, b in zip(curve.norms, expected.norms, strict=False)]  # the reference executor has none
        bits = "all" if curve.same_bits(expected) else "losses" if curve.losses == expected.losses else ""
        differences = (
            f"{curve.loss_difference(expected):.1e} | {f'{max(norms):.1e}' if norms else ''} | {curve.parameter_difference(expected):.1e}"
        )
        lines.append(f"| {ranks} | {text} | {family} | {curve.losses[-1]:.6f} | {differences} | {bits} |")
        print(lines[-1], flush=True)
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)  # torch's hints about the order of all-gathers
    text = table()
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
