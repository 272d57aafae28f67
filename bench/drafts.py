"""Speculative decoding beside plain decoding: tokens a second of one answer, the sides in turn.

    python bench/drafts.py [--force]        # wants a quiet machine; two minutes

Two texts: JSON that repeats what the prompt has said (a list of records given back with one field changed), which is what prompt lookup is for, and an answer
in free prose, which it is not. Every side of a text gives the same tokens (checked).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from typing import Any

from quiet import quiet

from armillary.models.load import LoadedModel, load
from armillary.serve.llm import LLM
from armillary.serve.request import SamplingParams

BAR = 1.8
TOKENS = 256
SIDES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("off", {}),
    ("ngram", {"speculate": "ngram"}),
    ("ngram, to 16", {"speculate": "ngram", "draft_tokens": 16}),
    ("layers", {"speculate": "layers", "draft_layers": 0.9}),
)


def texts() -> dict[str, str]:
    records = [{"id": i, "name": f"item {i}", "price": round(1.5 * i, 2), "tags": ["a", "b"], "in stock": True} for i in range(24)]
    listing = json.dumps(records, indent=1)
    return {
        "JSON": f"Here is a list of records:\n{listing}\nThe same list again:\n{listing[:160]}",
        "prose": "Write a long story about a lighthouse keeper and a storm.\n\nOnce upon a time",
    }


def measure(loaded: LoadedModel, weights: str, text: str, temperature: float, repeats: int) -> list[dict[str, Any]]:
    """Best tokens a second of each side, and what became of its drafts."""
    engines = {
        name: LLM(loaded, quantize=weights, prefix_cache="off", deterministic=True, kv_memory="400 MB", **options)
        for name, options in SIDES
    }
    sampling = SamplingParams(TOKENS, temperature=temperature, seed=1, ignore_eos=True)
    rates: dict[str, list[float]] = {name: [] for name in engines}
    answers: dict[str, tuple[int, ...]] = {}
    for _ in range(repeats + 1):
        for name, llm in engines.items():
            [completion] = llm.generate([text], sampling)
            request = completion.request
            assert request.first_token is not None
            assert request.last_token is not None
            rates[name].append((TOKENS - 1) * 1e9 / (request.last_token - request.first_token))
            assert answers.setdefault("all", completion.tokens) == completion.tokens, f"{name} gives other tokens"
    rows = []
    for name, llm in engines.items():
        stats = llm.engine.stats
        share = stats.accepted_tokens / stats.drafted_tokens if stats.drafted_tokens else None
        best = statistics.median(rates[name][1:])  # the first warms up
        rows.append({"weights": weights, "temperature": temperature, "side": name, "rate": best, "accepted": share})
    return rows


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| answer | weights | temperature | drafts | tok/s | times as fast | drafts accepted | bar | met |",
        "|---|---|---:|---|---:|---:|---:|---:|---|",
    ]
    for text, rows in found.items():
        for row in rows:
            plain = next(r["rate"] for r in rows if r["side"] == "off" and all(r[key] == row[key] for key in ("weights", "temperature")))
            ratio = row["rate"] / plain
            barred = text == "JSON" and row["side"].startswith("ngram") and not row["temperature"]
            accepted = "" if row["accepted"] is None else f"{100 * row['accepted']:.0f} %"
            weights = "fp32" if row["weights"] == "none" else row["weights"]
            lines.append(
                f"| {text} | {weights} | {row['temperature']:g} | {row['side']} | {row['rate']:,.0f} | {ratio:.2f} | {accepted} "
                f"| {f'{BAR:g}' if barred else ''} | {('yes' if ratio >= BAR else 'no') if barred else ''} |"
            )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    found: dict[str, list[dict[str, Any]]] = {}
    for name, text in texts().items():
        for weights in ("none", "int4"):
            for temperature in (0.0, 0.7) if name == "JSON" else (0.0,):
                found.setdefault(name, []).extend(measure(loaded, weights, text, temperature, options.repeats))
    print(f"One answer of {TOKENS} tokens at a time; load {os.getloadavg()[0]:.2f}.\n\n{table(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
