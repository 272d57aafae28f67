"""What every side of the training bench is asked to do, and how it answers. Standard library only: each side runs in its own environment.

A side reads one JSON file, trains from the weights of an HF folder on given batches, and prints one marked JSON line.
Run as `python -m peers.NAME recipe.json variant` from the folder `bench`.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.workload import MARK

SHOWN = 4  # first losses that a side reports, for comparison


@dataclass(frozen=True)
class Recipe:
    """Full-parameter training in fp32: AdamW, all parameters decayed alike, the gradient's norm bounded, a constant learning rate.

    `batches[i]` are rows of token ids, all of one length; every token but a row's first is a target, the mean over all of them is the loss.
    """

    name: str
    hf_folder: str
    batches: tuple[tuple[tuple[int, ...], ...], ...]
    threads: int
    steps: int  # timed ones at most, after the first, which is told apart: it compiles, allocates, measures
    seconds: float  # no further step after this long (three are always made, if `steps` allows)
    lr: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0

    @property
    def tokens(self) -> int:
        """Of a step."""
        return sum(map(len, self.batches[0]))

    def batch(self, step: int) -> tuple[tuple[int, ...], ...]:
        return self.batches[step % len(self.batches)]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @staticmethod
    def load(path: str | Path) -> Recipe:
        raw = json.loads(Path(path).read_text())
        batches = tuple(tuple(tuple(row) for row in batch) for batch in raw.pop("batches"))
        return Recipe(batches=batches, betas=tuple(raw.pop("betas")), **raw)


@dataclass(frozen=True)
class Steps:
    """What a side did. `seconds` without the first step's, which is `first`."""

    first: float
    seconds: tuple[float, ...]
    losses: tuple[float, ...]


def measure(step: Callable[[int], float], recipe: Recipe) -> Steps:
    """Trains: `step(i)` makes the i-th step on `recipe.batch(i)` and returns its loss."""
    start = time.perf_counter()
    losses = [step(0)]
    first = time.perf_counter() - start
    seconds: list[float] = []
    while len(seconds) < recipe.steps and (len(seconds) < 3 or sum(seconds) < recipe.seconds):
        start = time.perf_counter()
        losses.append(step(len(losses)))
        seconds.append(time.perf_counter() - start)
    return Steps(first, tuple(seconds), tuple(losses))


def report(side: str, version: str, variant: str, recipe: Recipe, steps: Steps, **more: float) -> None:
    """Print one result: tokens a second of the fastest and of the middle step."""
    ordered: Sequence[float] = sorted(steps.seconds)
    result = {
        "side": side,
        "version": version,
        "variant": variant,
        "case": recipe.name,
        "tokens_per_second": recipe.tokens / ordered[0],
        "median_tokens_per_second": recipe.tokens / ordered[len(ordered) // 2],
        "steps": len(ordered),
        "first_step_seconds": steps.first,
        "losses": list(steps.losses[:SHOWN]),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **more,
    }
    sys.stdout.write(f"\n{MARK}{json.dumps(result)}\n")
    sys.stdout.flush()
