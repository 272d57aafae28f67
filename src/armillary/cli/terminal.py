"""How the verbs speak: tables and progress on a terminal, plain lines into a pipe, JSON for machines."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from armillary.core.units import S, format_bytes, format_duration

Progress = Callable[[str, int, int], None]
"""Stage, bytes done, bytes in all."""


def on_terminal() -> bool:
    return sys.stdout.isatty()


def print_json(value: Any) -> None:
    """One JSON document."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """A table: drawn on a terminal, aligned columns with two spaces between them otherwise."""
    cells = [[str(cell) for cell in row] for row in rows]
    if on_terminal():
        from rich.box import SIMPLE_HEAD
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        drawn = Table(title=title or None, title_justify="left", box=SIMPLE_HEAD, show_header=any(columns))
        for index, column in enumerate(columns):
            drawn.add_column(column, justify="right" if _numeric(cells, index) else "left", overflow="fold")
        for row in cells:
            drawn.add_row(*(Text(cell) for cell in row))
        Console().print(drawn)
        return
    if title:
        print(title)
    lines = [list(columns), *cells] if any(columns) else cells
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def note(text: str) -> None:
    """A line for the reader that is no part of the result: stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def byte_progress(label: str) -> Iterator[Progress]:
    """A callback for downloads and the like: a bar on a terminal, else a line a stage and one every ten seconds. On stderr."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TransferSpeedColumn
        from rich.progress import Progress as Bar

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks: dict[str, Any] = {}

            def draw(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = bar.add_task(f"{label}: {stage}", total=total)
                bar.update(tasks[stage], completed=done, total=total)

            yield draw
        return
    said: dict[str, float] = {}

    def write(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage not in said or now - said[stage] >= 10:
            said[stage] = now
            note(f"{label}: {stage}, {format_bytes(done)} of {format_bytes(total)}")

    yield write


@contextmanager
def timed(doing: str) -> Iterator[Callable[[str], None]]:
    """Say what is being done and, at its end, how long it took. The yielded function sets the closing words. On stderr."""
    closing = [doing]
    start = time.perf_counter()
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status(doing):
            yield closing.append
    else:
        note(f"{doing} ...")
        yield closing.append
    note(f"{closing[-1]} ({format_duration((time.perf_counter() - start) * S)})")


def _numeric(rows: Sequence[Sequence[str]], index: int) -> bool:
    return bool(rows) and all(row[index][:1].isdigit() or row[index] in ("", "-") for row in rows)
