"""The measurements of the serving bench: prompts of real text, and lengths of real conversations."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from peers.workload import Case

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "LICENSE"  # English prose that is always here
NEW = 64  # tokens a decode case adds to each sequence
SCALE, LONGEST_PROMPT = 4, 512  # conversations are a quarter as long as in the trace: the model and the machine are small


def conversations() -> list[tuple[int, int]]:
    """(prompt, new) tokens of the trace's requests, scaled."""
    lines = (line for line in (HERE / "conversations.csv").read_text().splitlines() if not line.startswith("#"))
    rows = [(int(row["prompt_tokens"]) // SCALE, int(row["new_tokens"]) // SCALE) for row in csv.DictReader(lines)]
    return [(min(LONGEST_PROMPT, max(8, prompt)), max(2, new)) for prompt, new in rows]


def build(text: Sequence[int], requests: int, decode_prompts: Sequence[int] = (32, 512), batches: Sequence[int] = (1, 8, 32)) -> list[Case]:
    """All cases. `text` is a long text's tokens; sequence i starts elsewhere in it, so that no two share a prefix."""

    def prompt(index: int, length: int) -> tuple[int, ...]:
        start = (index * 61) % len(text)
        round_and_round = (*text[start:], *text) * (1 + length // len(text))
        return tuple(round_and_round[:length])

    cases = [Case("prefill-512", "prefill", (prompt(0, 512),), (NEW,))]
    for length in decode_prompts:
        for batch in batches:
            prompts = tuple(prompt(i, length) for i in range(batch))
            cases.append(Case(f"decode-{batch}-after-{length}", "decode", prompts, (NEW,) * batch))
    lengths = conversations()[:requests]
    prompts = tuple(prompt(i, length) for i, (length, _) in enumerate(lengths))
    cases.append(Case(f"offline-{len(lengths)}", "offline", prompts, tuple(new for _, new in lengths)))
    return cases
