"""A long prompt arrives while others decode: how long their tokens wait, prompts first and in chunks, the sides in turn.

    python bench/stalls.py [--publish] [--force]      # wants a quiet machine; two minutes

8 sequences decode; a prompt of 1,500 tokens arrives, and all go on until each of the 8 has 64 tokens more. Every side is ours and gives
the same tokens (checked): what differs is the policy. The time between tokens is taken over all 8 sequences from the arrival on; its 99th percentile
is the wait for the prompt, for one in 64 of these times is it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cases import TEXT
from quiet import quiet

from armillary.cluster.machine import describe
from armillary.models.load import LoadedModel, load
from armillary.serve.llm import LLM
from armillary.serve.request import Event, Request, SamplingParams

BAR = 4.0  # times shorter than with prompts first
DECODES, TOKENS, PROMPT = 8, 64, 1500
TARGETS = {"none": "200ms", "int4": "100ms"}
FIRST = "vllm, whole prompts"


def sides(weights: str) -> dict[str, dict[str, Any]]:
    return {
        FIRST: {"policy": "vllm", "max_batch_tokens": 4096},
        "orca": {"policy": "orca", "max_batch_tokens": 4096},
        "sarathi": {"policy": "sarathi"},
        f"sarathi, --tbt-target {TARGETS[weights]}": {"policy": "sarathi", "tbt_target": TARGETS[weights]},
    }


def run(llm: LLM, prompts: Sequence[Sequence[int]], long: Sequence[int], name: str) -> tuple[list[int], int, list[list[int]]]:
    """Every time between two tokens since the long prompt's arrival, and its time to first token, in ns; and all tokens."""
    engine, at = llm.engine, {}
    gaps: list[int] = []
    arrived = False

    def told(event: Event) -> None:
        if arrived and event.token is not None and event.request_id in at:
            gaps.append(event.at - at[event.request_id])
        at[event.request_id] = event.at

    most = SamplingParams(TOKENS + 16, temperature=0.0, ignore_eos=True)
    requests = [Request(f"{name} {i}", tuple(prompt), most, on_event=told) for i, prompt in enumerate(prompts)]
    for request in requests:
        engine.submit(request)
    while min(len(request.output) for request in requests) < 16:
        engine.step()
    arrived = True
    late = Request(f"{name} late", tuple(long), SamplingParams(4, temperature=0.0, ignore_eos=True))
    engine.submit(late)
    engine.run_until_idle()
    assert late.first_token is not None
    assert late.arrival is not None
    return gaps, late.first_token - late.arrival, [request.output for request in (*requests, late)]


def measure(loaded: LoadedModel, weights: Any, repeats: int) -> list[dict[str, Any]]:
    """The 99th percentile of the time between tokens, and the prompt's time to first token, of each side: medians in seconds."""
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    prompts = [tokens[61 * i : 61 * i + 32] for i in range(DECODES)]
    long = (tokens * 2)[1000 : 1000 + PROMPT]
    engines = {
        name: LLM(loaded, quantize=weights, prefix_cache="off", deterministic=True, kv_memory="200 MB", **options)
        for name, options in sides(weights).items()
    }
    waits: dict[str, list[float]] = {name: [] for name in engines}
    firsts: dict[str, list[float]] = {name: [] for name in engines}
    answers = None
    for turn in range(repeats + 1):  # the first warms up, and finds the budget
        for name, llm in engines.items():
            gaps, first, found = run(llm, prompts, long, f"{turn}")
            assert answers in (None, found), f"{name} gives other tokens"
            answers = found
            if turn:
                waits[name].append(sorted(gaps)[len(gaps) * 99 // 100] / 1e9)
                firsts[name].append(first / 1e9)
    return [{"side": name, "p99": statistics.median(waits[name]), "first": statistics.median(firsts[name])} for name in engines]


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| weights | policy | 99 % of the times between tokens within | times shorter | bar | met | the prompt's first token after |",
        "|---|---|---:|---:|---:|---|---:|",
    ]
    for weights, rows in found.items():
        whole = next(row["p99"] for row in rows if row["side"] == FIRST)
        for row in rows:
            ratio, barred = whole / row["p99"], "tbt" in row["side"]
            verdict = f"{BAR:g} | {'yes' if ratio >= BAR else 'no'}" if barred else " | "
            lines.append(
                f"| {'fp32' if weights == 'none' else weights} | {row['side']} | {1e3 * row['p99']:,.0f} ms | {ratio:.1f} | {verdict} "
                f"| {1e3 * row['first']:,.0f} ms |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--publish", action="store_true", help="write bench/results/stalls.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    found = {weights: measure(loaded, weights, options.repeats) for weights in ("none", "int4")}
    text = (
        f"# A prompt of {PROMPT:,} tokens amid {DECODES} decodes\n\n{describe().cpu}, SmolLM2-135M, medians of {options.repeats}. `python bench/stalls.py`, "
        f"{datetime.now(UTC):%Y-%m-%d}.\nLoad average {before:.2f} before, {os.getloadavg()[0]:.2f} after (the bench's own threads included). "
        f"All sides give the same tokens.\n\n{table(found)}\n"
    )
    print(text)
    if options.publish:
        (Path(__file__).parent / "results" / "stalls.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
