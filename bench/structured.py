"""What following a grammar costs: tokens a second of answers held to a JSON schema, beside free answers to the same prompt.

    python bench/structured.py [--force]        # wants a quiet machine; two minutes

Three sides take turns: free; held to the schema token by token, which is the cost of masks alone; and held to it with what the schema
forces drafted (jump-forward), as the server does it. The answers are a list that does not end before the last token.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

from quiet import quiet

from armillary.models.load import LoadedModel, load
from armillary.serve.grammar import grammar as grammars
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

BAR = 0.05  # of the free rate, lost to masks
TOKENS = 192
PROMPT = "A list of people in JSON, with name, age, city and job of each:\n"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}, "job": {"type": "string"}},
    "required": ["name", "age", "city", "job"],
}
SCHEMA = {"type": "array", "items": PERSON, "minItems": 500}
SIDES = ("free", "masks alone", "with jump-forward", "with jump-forward, no spaces to choose")


def measure(loaded: LoadedModel, weights: str, batch: int, temperature: float, repeats: int) -> dict[str, dict[str, Any]]:
    """Median tokens a second of each side, all answers of a batch together, and the share of forced tokens that was drafted right."""
    llm = LLM(loaded, quantize=weights, prefix_cache="off", kv_memory="400 MB")
    jump = llm.engine.drafter
    spaced, compact = grammars.json_schema(SCHEMA), grammars.json_schema(SCHEMA, spaces=None)
    rates: dict[str, list[float]] = {name: [] for name in SIDES}
    drafts = dict.fromkeys(SIDES, (0, 0))
    for _ in range(repeats + 1):
        for name in SIDES:
            llm.engine.drafter = jump if "jump" in name else None
            grammar = None if name == "free" else compact if "no spaces" in name else spaced
            sampling = [SamplingParams(TOKENS, temperature=temperature, seed=seed, ignore_eos=grammar is None) for seed in range(batch)]
            answers = llm.generate([PROMPT] * batch, sampling, grammar=grammar)
            assert {len(answer.tokens) for answer in answers} == {TOKENS}
            begin = max(answer.request.first_token or 0 for answer in answers)
            end = max(answer.request.last_token or 0 for answer in answers)
            rates[name].append(batch * (TOKENS - 1) * 1e9 / (end - begin))
            drafts[name] = (sum(answer.request.drafted for answer in answers), sum(answer.request.accepted for answer in answers))
    return {name: {"rate": statistics.median(rates[name][1:]), "drafts": drafts[name]} for name in SIDES}  # the first warms up


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    print(f"SmolLM2-135M, {TOKENS} tokens an answer, median of {options.repeats} rounds; a list of objects with four fields.\n")
    print("| weights | answers at once | temperature | side | tok/s | of the free rate | forced tokens drafted right | bar | met |")
    print("|---|---:|---:|---|---:|---:|---:|---|---|")
    for weights in ("none", "int4"):
        for batch, temperature in ((1, 0.0), (1, 1.0), (8, 0.0)):
            found = measure(loaded, weights, batch, temperature, options.repeats)
            free = found["free"]["rate"]
            for name, row in found.items():
                ratio, (drafted, accepted) = row["rate"] / free, row["drafts"]
                right = f"{accepted} of {drafted}" if drafted else ""
                bar = f">= {1 - BAR:.0%} | {'yes' if ratio >= 1 - BAR else 'no'}" if name == "masks alone" else " | "
                shown = "fp32" if weights == "none" else weights
                print(f"| {shown} | {batch} | {temperature:g} | {name} | {row['rate']:,.0f} | {ratio:.0%} | {right} | {bar} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
