"""The prefix-cache measurement that every side makes: requests that share a beginning, one after another, each until its first token.

Standard library only: each side runs in its own environment.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.workload import MARK


@dataclass(frozen=True)
class Prefix:
    """`prompts` share their first `shared` tokens; `warm` shares nothing with them and is run before the clock."""

    prompts: tuple[tuple[int, ...], ...]
    warm: tuple[int, ...]
    shared: int
    hf_folder: str
    gguf_file: str
    threads: int

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: str) -> Prefix:
        value = json.loads(Path(path).read_text())
        return cls(**{**value, "prompts": tuple(map(tuple, value["prompts"])), "warm": tuple(value["warm"])})


def measure(first_token: Callable[[Sequence[int]], int], work: Prefix, side: str, version: str, variant: str) -> None:
    """Times each request and prints the result. The warm prompt is run at both lengths that come: whole, and after a hit."""
    first_token(work.warm)
    first_token((*work.warm[: work.shared], *work.warm[: len(work.warm) - work.shared]))
    seconds, tokens = [], []
    for prompt in work.prompts:
        start = time.perf_counter()
        tokens.append(first_token(prompt))
        seconds.append(time.perf_counter() - start)
    result = {"side": side, "version": version, "variant": variant, "seconds": seconds, "tokens": tokens}
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()
