"""`--help` into a pipe or a file: plain lines, wrapped once and to the reader's width."""

from __future__ import annotations

import os
import textwrap
from typing import TYPE_CHECKING

from cyclopts.help import PlainFormatter

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 80  # where nobody says how wide


class WrappedPlain(PlainFormatter):
    """cyclopts' own wraps to one width, and the console that it writes to wraps that again."""

    def _print_plain(self, console: Console, text: str) -> None:
        lead = text[: len(text) - len(text.lstrip(" "))]
        for paragraph in text.split("\n\n"):
            filled = textwrap.fill(
                " ".join(paragraph.split()),
                width(),
                initial_indent=lead,
                subsequent_indent=3 * lead,
                break_long_words=False,
                break_on_hyphens=False,
            )
            console.print(filled, highlight=False, markup=False, soft_wrap=True)


def width() -> int:
    """Columns: as COLUMNS says, or the terminal that is left when stdout is a pipe."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return max(int(os.environ["COLUMNS"]), 20)
    for stream in (1, 2, 0):
        try:
            return os.get_terminal_size(stream).columns or WIDTH
        except OSError:
            continue
    return WIDTH
