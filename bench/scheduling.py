"""What scheduling costs: the share of a decode step that is not the model, with 256 sequences running.

    python bench/scheduling.py [--publish] [--force]      # wants a quiet machine; two minutes

Everything outside the executor counts: the policy, the check of its schedule, block tables, accepting tokens, telling the history.
The rows with a queue have 1,000 requests waiting; those with text also turn every sequence's tokens into text, as a server does.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cases import TEXT
from quiet import quiet

from armillary.cluster.machine import describe
from armillary.models.load import LoadedModel, load
from armillary.serve.llm import LLM
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Outcome, Plan
from armillary.serve.text import TextStream

BAR = 3.0  # percent
RUNNING, QUEUE, PROMPT = 256, 1000, 32
CASES: tuple[tuple[str, dict[str, Any], int, bool], ...] = (  # name, options, waiting requests, text
    ("sarathi", {}, 0, False),
    ("sarathi, with text", {}, 0, True),
    ("sarathi, --tbt-target 10s, with a queue", {"tbt_target": "10s"}, QUEUE, False),
    ("vllm", {"policy": "vllm"}, 0, False),
    ("orca", {"policy": "orca"}, 0, False),
    ("sarathi, --order sjf, with a queue", {"order": "sjf"}, QUEUE, False),
    ("sarathi, --order prefix --victim cost, with a queue", {"order": "prefix", "victim": "cost"}, QUEUE, False),
)


class Timed:
    """An executor that notes how long it ran."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.seconds = 0.0

    def run(self, plan: Plan) -> Outcome:
        start = time.perf_counter()
        outcome: Outcome = self.inner.run(plan)
        self.seconds = time.perf_counter() - start
        return outcome


def measure(loaded: LoadedModel, weights: Any, options: dict[str, Any], queue: int, text: bool, steps: int) -> dict[str, float]:
    """Median seconds of a step and of what is not the executor in it."""
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    llm = LLM(loaded, quantize=weights, max_running=RUNNING, max_batch_tokens=2048, kv_memory="1500 MB", **options)
    engine = llm.engine
    executor = engine.executor = Timed(engine.executor)
    sampling = SamplingParams(steps + 40, temperature=0.0, ignore_eos=True)
    for index in range(RUNNING + queue):
        prompt = tuple((tokens * 2)[7 * index % len(tokens) :][:PROMPT])
        engine.submit(Request(f"{index}", prompt, sampling, text=TextStream(loaded.tokenizer) if text else None))
    while engine.stats.generated_tokens < 4 * RUNNING:
        engine.step()
    whole, rest = [], []
    for _ in range(steps):
        start = time.perf_counter()
        engine.step()
        whole.append(time.perf_counter() - start)
        rest.append(whole[-1] - executor.seconds)
    state = engine.snapshot()
    assert (state["running"], state["waiting"]) == (RUNNING, queue)
    engine.stop()
    return {"step": statistics.median(whole), "rest": statistics.median(rest)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--publish", action="store_true", help="write bench/results/scheduling.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    lines = ["| weights | policy | a step | scheduling | share | bar | met |", "|---|---|---:|---:|---:|---:|---|"]
    for weights in ("int4", "none"):
        for name, extra, queue, text in CASES if weights == "int4" else CASES[:1]:
            found = measure(loaded, weights, extra, queue, text, options.steps)
            share = 100 * found["rest"] / found["step"]
            lines.append(
                f"| {'fp32' if weights == 'none' else weights} | {name} | {1e3 * found['step']:,.0f} ms | {1e3 * found['rest']:.2f} ms "
                f"| {share:.2f} % | {BAR:g} % | {'yes' if share <= BAR else 'no'} |"
            )
            print(lines[-1], flush=True)
    text = (
        f"# What scheduling costs with {RUNNING} sequences running\n\n{describe().cpu}, SmolLM2-135M, medians of {options.steps} decode steps. "
        f"`python bench/scheduling.py`, {datetime.now(UTC):%Y-%m-%d}.\nLoad average {before:.2f} before, {os.getloadavg()[0]:.2f} after "
        "(the bench's own threads included).\n\n" + "\n".join(lines) + "\n"
    )
    print(f"\n{text}")
    if options.publish:
        (Path(__file__).parent / "results" / "scheduling.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
