"""A run as its reader sees it while it goes: a live picture on a terminal, lines into a pipe, JSON for machines."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Final, Protocol, TextIO

import torch

from armillary.core.units import S, format_bytes, format_count, format_duration
from armillary.train.chart import chart
from armillary.train.evaluate import Evaluation
from armillary.train.meter import Reading, finite

PLAIN_SECONDS: Final = 5.0


class View(Protocol):
    """Told of every step and evaluation."""

    def step(self, reading: Reading) -> None: ...

    def evaluation(self, step: int, result: Evaluation) -> None: ...

    def note(self, text: str) -> None:
        """A line for the reader between steps."""
        ...

    def close(self) -> None: ...


def choose(title: str, steps: int, as_json: bool) -> View:
    """The view for this stdout and stderr."""
    if as_json:
        return JsonView()
    return LiveView(title, steps) if sys.stderr.isatty() else PlainView()


class JsonView:
    """One JSON object a line on stdout."""

    def __init__(self, out: TextIO | None = None) -> None:
        self.out = out or sys.stdout

    def step(self, reading: Reading) -> None:
        self._write(reading.json())

    def evaluation(self, step: int, result: Evaluation) -> None:
        self._write(evaluation_json(step, result))

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def _write(self, value: dict[str, Any]) -> None:
        print(json.dumps(value), file=self.out, flush=True)


class PlainView:
    """The first step, the last, and one every few seconds, on stderr."""

    def __init__(self, out: TextIO | None = None, every: float = PLAIN_SECONDS, now: Callable[[], float] = time.monotonic) -> None:
        self.out, self.every, self.now = out or sys.stderr, every, now
        self._said: float | None = None

    def step(self, reading: Reading) -> None:
        now = self.now()
        if self._said is None or now - self._said >= self.every or reading.step == reading.steps or reading.skipped:
            self._said = now
            self.note(line(reading))

    def evaluation(self, step: int, result: Evaluation) -> None:
        self.note(evaluation_line(step, result))

    def note(self, text: str) -> None:
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        pass


class LiveView:
    """A picture that is redrawn in place on stderr: the loss so far, the numbers, the time left."""

    def __init__(self, title: str, steps: int) -> None:
        from rich.console import Console
        from rich.live import Live

        self.title, self.steps = title, steps
        self.losses: list[float] = []
        self.evaluations: list[tuple[int, Evaluation]] = []
        self.reading: Reading | None = None
        self._begun = time.monotonic()
        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=8, get_renderable=self._picture)
        self._live.start()

    def step(self, reading: Reading) -> None:
        self.reading = reading
        self.losses.append(reading.loss)

    def evaluation(self, step: int, result: Evaluation) -> None:
        self.evaluations.append((step, result))

    def note(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()

    def _picture(self) -> Any:
        from rich.box import ROUNDED
        from rich.columns import Columns
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        reading = self.reading
        wide = max(24, min(72, self._console.width - 46))
        if reading is None:
            words = Text(
                f"{self.title}\nthe first step is under way ({format_duration((time.monotonic() - self._begun) * S)})", style="dim"
            )
            return Panel(words, box=ROUNDED, border_style="cyan", width=min(self._console.width, wide + 44))
        numbers = Table.grid(padding=(0, 2))
        numbers.add_column(style="dim")
        numbers.add_column(justify="right", style="bold")
        for name, value in facts(reading):
            numbers.add_row(name, value)
        for step, result in self.evaluations[-2:]:
            numbers.add_row(f"held out, step {step:,}", f"{result.loss:.4f}")
        drawn = chart(self.losses, wide - 8, 11, self.steps)
        # The axis says what the dots show: the means of columns lie within the losses' range.
        high, low = max(self.losses), min(self.losses)
        labels = [f"{high:6.3f} ", *["       "] * (len(drawn) - 2), f"{low:6.3f} "]
        picture = Text()
        for label, cells in zip(labels, drawn, strict=True):
            picture.append(label, style="dim")
            picture.append(cells + "\n", style="cyan")
        picture.append("       loss of every step, nats a token", style="dim")
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=self.steps, completed=reading.step, width=wide, complete_style="cyan", finished_style="green"),
            Text(f"step {reading.step:,} of {self.steps:,}, {time_left(reading)}"),
        )
        body = Group(Columns([picture, numbers], padding=(0, 3)), Text(), bar)
        return Panel(
            body, title=self.title, title_align="left", box=ROUNDED, border_style="cyan", width=min(self._console.width, wide + 44)
        )


def facts(reading: Reading) -> list[tuple[str, str]]:
    """The numbers of a reading, each with its name and unit."""
    rows = [
        ("loss", f"{reading.loss:.4f}"),
        ("gradient norm", f"{reading.gradient_norm:.3f}"),
        ("learning rate", f"{reading.learning_rate:.2e}"),
        ("tokens", format_count(reading.tokens)),
        ("speed", f"{format_count(round(reading.tokens_per_second))} tokens/s"),
    ]
    if reading.mfu is not None and reading.hfu is not None:
        rows.append(("MFU", f"{100 * reading.mfu:.1f} %"))
        if reading.hfu != reading.mfu:
            rows.append(("HFU", f"{100 * reading.hfu:.1f} %"))
    rows.append(("memory", format_bytes(reading.memory)))
    if reading.waited > 0.005:
        rows.append(("waits for data", f"{100 * reading.waited:.1f} %"))
    if reading.loss_scale != 1.0:
        rows.append(("loss scale", f"{reading.loss_scale:g}" + (", skipped" if reading.skipped else "")))
    return rows


def line(reading: Reading) -> str:
    """A reading in one line."""
    words = ", ".join(f"{name} {value}" for name, value in facts(reading))
    return f"step {reading.step:,}/{reading.steps:,}: {words}, {time_left(reading)}"


def time_left(reading: Reading) -> str:
    return "done" if reading.step == reading.steps else f"{format_duration(reading.seconds_left * S)} left"


def evaluation_line(step: int, result: Evaluation) -> str:
    return f"held-out text after {step:,} steps: loss {result.loss:.4f}, perplexity {result.perplexity:.2f} over {result.tokens:,} tokens"


def evaluation_json(step: int, result: Evaluation) -> dict[str, Any]:
    """As `--json` and metrics.jsonl have it; None for what is not finite, which JSON cannot say."""
    return {
        "event": "evaluation",
        "step": step,
        "loss": finite(result.loss),
        "perplexity": finite(result.perplexity),
        "tokens": result.tokens,
    }


def memory_bytes() -> int:
    """What this process holds: resident memory, or on a GPU the most that torch had allocated there."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():  # a GPU that this run leaves alone says nothing of it
        return int(torch.cuda.max_memory_allocated())
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
