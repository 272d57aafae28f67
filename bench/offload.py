"""What it costs to serve a model that is larger than the accelerator's memory, and what FlexGen's block schedule wins back.

    python bench/offload.py --publish [--force]     # wants a quiet machine; two minutes

SmolLM2 in fp32, greedy answers to prompts of 64 tokens. The weights lie in the arena, in RAM or on disk; 8 sequences pass the layers at a
time, alone (a block of 8) or with three more batches that share each load of weights (a block of 32). The arena is memory of this machine,
so a load is a copy from memory to memory: what is measured is the schedule, not a bus. With the machine's `--profile` (armillary calibrate) each row
has what `armillary plan offload` predicts beside it; a disk that this machine's page cache holds is priced as RAM.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from cases import TEXT

from armillary.cluster.cluster import cluster
from armillary.cluster.machine import describe
from armillary.cluster.profile import load as load_profile
from armillary.models.graph.find import find
from armillary.models.load import load
from armillary.plan.offload import work_of
from armillary.plan.offload_place import place
from armillary.serve.llm import LLM
from armillary.serve.offload.cost import price
from armillary.serve.offload.policy import OffloadPolicy, Split
from armillary.serve.request import SamplingParams

HERE = Path(__file__).resolve().parent
QUIET = 0.5  # load average above which timings mean nothing
SEQUENCES, PROMPT, ANSWER = 8, 64, 32
TIERS = {"in the arena": "100/0/0", "in RAM": "0/100/0", "on disk": "0/0/100"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--answer", type=int, default=ANSWER, help="tokens of each answer")
    parser.add_argument("--profile", type=Path, help="of this machine, for what is predicted")
    parser.add_argument("--publish", action="store_true", help="write bench/results/offload.{json,md}; wants a quiet machine")
    parser.add_argument("--force", action="store_true", help="publish although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if before > QUIET and options.publish and not options.force:
        print(f"not measured: the load average is {before:.2f}; wait for a quiet machine, or --force", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for where, weights in TIERS.items():
            for batches in (1, 4):
                row = measure(weights, batches, options.answer, options.threads, folder)
                found.append(
                    {"weights": where, "batches": batches, **row, "planned": planned(options.profile, weights, batches, options.answer)}
                )
                print(found[-1], file=sys.stderr, flush=True)
    text = page(found, options.threads, before)
    print(text)
    if options.publish:
        (HERE / "results" / "offload.md").write_text(text)
        (HERE / "results" / "offload.json").write_text(json.dumps({"rows": found, "load": before}, indent=1) + "\n")
    return 0 if len({tuple(row["first"]) for row in found}) == 1 else 1


def measure(weights: str, batches: int, answer: int, threads: int, folder: str) -> dict[str, Any]:
    """Tokens a second of the answers after the first tokens, bytes of weights loaded for each, and the arena's size."""
    loaded = load("smollm2")
    count = SEQUENCES * batches
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    prompts = [tokens[PROMPT * i : PROMPT * (i + 1)] for i in range(count)]
    llm = LLM(
        loaded,
        offload=f"weights={weights},cache=0/100/0,batches={batches}",
        offload_folder=folder,
        policy="request-level",
        max_running=count,
        max_batch_tokens=count * PROMPT,
        context=PROMPT + answer,
        kv_blocks=count * -(-(PROMPT + answer) // 16),
        prefix_cache="off",
        threads=threads,
    )
    forward: Any = llm.engine.executor.forward  # type: ignore[attr-defined]
    start = time.perf_counter()
    llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True))
    prefill, before = time.perf_counter() - start, moved(forward)
    start = time.perf_counter()
    answers = llm.generate(prompts, SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True))
    seconds = time.perf_counter() - start - prefill
    made = count * (answer - 1)
    per_token = (moved(forward) - before) / (count * answer)
    return {
        "tokens_per_second": made / seconds,
        "bytes_per_token": per_token,
        "arena": forward.arena.used,
        "first": list(answers[0].tokens),
    }


def planned(profile: Path | None, weights: str, batches: int, answer: int) -> float | None:
    """Tokens a second after the first tokens by the cost model, the head priced as so many layers."""
    if profile is None:
        return None
    where = place(cluster(str(profile)), load_profile(profile), arena=10**9)
    work = replace(work_of(find("smollm2"), where, PROMPT, answer, False), block=SEQUENCES * batches, batch=SEQUENCES)
    split = OffloadPolicy.parse(f"weights={weights}").weights
    cost = price(work, Split(split.arena, split.ram + split.disk), Split(0.0, 1.0), Split(1.0), where.hardware(work))
    return work.block / ((work.layers + work.head) * cost.generation)


def moved(forward: Any) -> int:
    return sum(size for (what, _, _), size in forward.moved.items() if what == "weights")


def page(found: list[dict[str, Any]], threads: int, load: float) -> str:
    base = {row["batches"]: row["tokens_per_second"] for row in found if row["weights"] == "in the arena"}
    lines = [
        "# A model larger than the accelerator",
        "",
        f"{describe().cpu}, {threads} threads, SmolLM2-135M in fp32, the KV cache in RAM, {SEQUENCES} sequences a batch.",
        f"`python bench/offload.py`, {datetime.now(UTC):%Y-%m-%d}. Load average {load:.2f} before, {os.getloadavg()[0]:.2f} after (its own threads included).",
        "",
        "| weights | batches in a block | arena | weights loaded a token | tokens/s | of the speed in the arena | predicted over measured |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found:
        share = row["tokens_per_second"] / base[row["batches"]]
        predicted = "-" if row["planned"] is None else f"{row['planned'] / row['tokens_per_second']:.2f}"
        lines.append(
            f"| {row['weights']} | {row['batches']} | {row['arena'] / 1e6:,.0f} MB | {row['bytes_per_token'] / 1e6:,.1f} MB | {row['tokens_per_second']:.1f} | {share:.0%} | {predicted} |"
        )
    same = len({tuple(row["first"]) for row in found}) == 1
    return "\n".join([*lines, "", f"The first prompt's answers are {'all the same' if same else 'NOT all the same'}.", ""])


if __name__ == "__main__":
    sys.exit(main())
