"""What `--deterministic` costs, and what it buys: python bench/deterministic.py [--threads N] (on a quiet machine).

Both engines, with and without it, run the same cases in this process, one right after the other, best of several. Beside the
speeds: of the log-probabilities that eight sequences have alone, how many change a bit when they run together.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

import cases
from peers.workload import Case, Workload, measure

from armillary.models.load import load
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

FORMATS = ("none", "int8", "int4")
TOGETHER = 8
CONTEXT = 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    print(f"load average before: {os.getloadavg()[0]:.2f}")
    tokens = load(options.model).tokenizer.encode(cases.TEXT.read_text(), special=False)
    asked = [case for case in cases.build(tokens, 8, CONTEXT, decode_prompts=(32,)) if case.kind != "offline"]
    workload = Workload(tuple(asked), "", "", "", options.threads, options.repeats, 30.0)
    print("| weights | case | plain, tokens/s | deterministic | cost |")
    print("|---|---|---:|---:|---:|")
    changed: dict[str, str] = {}
    for quantize in FORMATS:
        plain, bound = (engine(options, quantize=quantize, deterministic=wanted) for wanted in (False, True))
        for case in asked:
            without, with_it = (measure(greedy(llm), workload, case)[0] for llm in (plain, bound))
            print(f"| {quantize} | {case.name} | {without:,.0f} | {with_it:,.0f} | {100 * (without / with_it - 1):+.1f} % |", flush=True)
        for name, llm in (("plain", plain), ("deterministic", bound)):
            changed[f"{quantize}, {name}"] = company(llm, asked)
    changed["none, torch"] = company(engine(options, backend="torch"), asked)
    print(f"\n| engine | log-probabilities that change in company, of {TOGETHER} sequences |\n|---|---|")
    for name, words in changed.items():
        print(f"| {name} | {words} |")
    print(f"load average after: {os.getloadavg()[0]:.2f}")


def engine(options: argparse.Namespace, **more: object) -> LLM:
    return LLM(options.model, threads=options.threads, prefix_cache="off", **more)


def greedy(llm: LLM) -> object:
    def generate(prompts: Sequence[Sequence[int]], new: Sequence[int]) -> list[list[int]]:
        sampling = [SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True) for count in new]
        return [list(completion.tokens) for completion in llm.generate([list(prompt) for prompt in prompts], sampling)]

    return generate


def company(llm: LLM, asked: Sequence[Case]) -> str:
    """Changed of all, prompts and new tokens, and the largest change."""
    prompts = [list(prompt) for prompt in next(case for case in asked if case.batch == TOGETHER).prompts]
    sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=0, prompt_logprobs=0)

    def scores(given: list[list[int]]) -> list[list[tuple[int, float | None]]]:
        return [
            [(one.token, one.logprob) for one in (*done.request.prompt_logprobs[1:], *done.logprobs)]
            for done in llm.generate(given, sampling)
        ]

    together, alone = scores(prompts), [scores([prompt])[0] for prompt in prompts]
    pairs = [pair for a, b in zip(together, alone, strict=True) for pair in zip(a, b, strict=True)]
    apart = [abs((x[1] or 0.0) - (y[1] or 0.0)) for x, y in pairs if x[0] == y[0]]
    return f"{sum(x != y for x, y in pairs)} of {len(pairs)}, by at most {max(apart):.1e}"


if __name__ == "__main__":
    main()
