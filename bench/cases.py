"""The measurements of the serving bench: prompts of real text, and lengths of real conversations."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

from peers.workload import Case

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "LICENSE"  # English prose that is always here
NEW = 64  # tokens a decode case adds to each sequence
BARS = ("prefill-512", "decode-*-after-32", "offline-64")  # the cases that have a bar


def conversations(context: int) -> list[tuple[int, int]]:
    """(prompt, new) tokens of the trace's requests, as they are; a prompt that leaves no room in `context` is cut (none of the trace's first 64 is)."""
    lines = (line for line in (HERE / "conversations.csv").read_text().splitlines() if not line.startswith("#"))
    rows = [(int(row["prompt_tokens"]), int(row["new_tokens"])) for row in csv.DictReader(lines)]
    return [(min(prompt, context - new), new) for prompt, new in rows]


def build(
    text: Sequence[int], context: int, requests: int, decode_prompts: Sequence[int] = (32, 512), batches: Sequence[int] = (1, 8, 32)
) -> list[Case]:
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
    lengths = conversations(context)[:requests]
    prompts = tuple(prompt(i, length) for i, (length, _) in enumerate(lengths))
    cases.append(Case(f"offline-{len(lengths)}", "offline", prompts, tuple(new for _, new in lengths)))
    return cases
