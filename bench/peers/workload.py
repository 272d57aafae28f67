"""What every side of the bench is asked to do, and how it answers. Standard library only: each side runs in its own environment.

A side reads one JSON file and prints one JSON line a case, marked so that a library's own chatter does not matter.
Run as `python -m peers.NAME workload.json` from the folder `bench`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

MARK = "@result "
SHOWN = 16  # new tokens of a case's first request that a side reports, for comparison
WARM = 8  # requests of an offline case that warm a side up
Kind = Literal["prefill", "decode", "offline"]


@dataclass(frozen=True)
class Case:
    """One measurement. `prompts[i]` is continued greedily by exactly `new[i]` tokens, end-of-text ignored.

    prefill: prompt tokens a second until the first new token. decode: new tokens a second of the whole batch, after the
    first of each. offline: all requests are there at the start; new tokens a second over the whole time.
    """

    name: str
    kind: Kind
    prompts: tuple[tuple[int, ...], ...]
    new: tuple[int, ...]

    @property
    def batch(self) -> int:
        return len(self.prompts)

    @property
    def prompt_tokens(self) -> int:
        return sum(len(prompt) for prompt in self.prompts)


@dataclass(frozen=True)
class Workload:
    """The cases, the weights (an HF folder and a GGUF file of the same values) and the settings that all sides share."""

    cases: tuple[Case, ...]
    hf_folder: str
    gguf_file: str
    scratch: str  # a folder for files that a side makes for itself
    threads: int
    repeats: int  # best of at most this many
    seconds: float  # no further repeat of a case after this long (two are always made, if `repeats` allows)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(len(prompt) + new for case in self.cases for prompt, new in zip(case.prompts, case.new, strict=True))

    @property
    def largest_batch(self) -> int:
        return max(case.batch for case in self.cases)

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: str | Path) -> Workload:
        raw = json.loads(Path(path).read_text())
        cases = tuple(
            Case(case["name"], case["kind"], tuple(tuple(prompt) for prompt in case["prompts"]), tuple(case["new"]))
            for case in raw.pop("cases")
        )
        return Workload(cases=cases, **raw)


def best(run: Callable[[], Any], workload: Workload) -> float:
    """Seconds of the fastest of several runs."""
    taken: list[float] = []
    while len(taken) < workload.repeats and (len(taken) < 2 or sum(taken) < workload.seconds):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


Generate = Callable[[Sequence[Sequence[int]], Sequence[int]], list[list[int]]]


def measure(generate: Generate, workload: Workload, case: Case) -> tuple[float, list[int]]:
    """Tokens a second of a case, and the first request's new tokens, for a side that only offers `generate(prompts, new)`.

    Decoding is a difference: the time for all tokens less the time for the first of each, so neither the prompt
    nor what a call costs once is counted.
    """
    first_ones = WARM if case.kind == "offline" else case.batch
    # Also warms up: compilation, allocation, packed weights.
    tokens = generate(case.prompts[:first_ones], [min(new, SHOWN) for new in case.new[:first_ones]])[0]
    if case.kind == "prefill":
        return case.prompt_tokens / best(lambda: generate(case.prompts, [1] * case.batch), workload), tokens
    whole = best(lambda: generate(case.prompts, case.new), workload)
    if case.kind == "offline":
        return sum(case.new) / whole, tokens
    first = best(lambda: generate(case.prompts, [1] * case.batch), workload)
    return sum(new - 1 for new in case.new) / max(whole - first, 1e-9), tokens


def report(
    side: str, version: str, case: Case, tokens_per_second: float, tokens: Sequence[int], variant: str = "", weight_bytes: int | None = None
) -> None:
    """Print one result. `weight_bytes`: what a decode step reads of the weights, where the side knows it."""
    result = {
        "side": side,
        "version": version,
        "variant": variant,
        "case": case.name,
        "tokens_per_second": tokens_per_second,
        "tokens": list(tokens[:SHOWN]),
        "weight_bytes": weight_bytes,
    }
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()


def results(output: str) -> list[dict[str, Any]]:
    """The results in a side's output."""
    return [json.loads(line.removeprefix(MARK)) for line in output.splitlines() if line.startswith(MARK)]
