"""Traces in CSV files: the columns of Vidur, of the Azure LLM inference traces and of BurstGPT."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Final

from armillary.core.errors import FormatError
from armillary.core.units import S
from armillary.serve.workload.requests import Arrival


def _seconds(text: str) -> int:
    return round(float(text) * S)


def _instant(text: str) -> int:
    """ns since 1970 of `2023-11-16 18:15:46.6805900`, in UTC where it has no offset."""
    whole, dot, rest = text.strip().partition(".")
    digits = rest[: len(rest) - len(rest.lstrip("0123456789"))]
    base = datetime.fromisoformat(whole + rest[len(digits) :] if dot else whole)
    days = base.replace(tzinfo=None) - (base.utcoffset() or base - base) - datetime(1970, 1, 1)
    return (days.days * 86_400 + days.seconds) * S + (round(float(f"0.{digits}") * S) if digits else 0)


_FORMATS: Final[tuple[tuple[str, str, str, Callable[[str], int], bool], ...]] = (
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens", _seconds, False),  # microsoft/vidur
    ("TIMESTAMP", "ContextTokens", "GeneratedTokens", _instant, True),  # Azure/AzurePublicDataset
    ("Timestamp", "Request tokens", "Response tokens", _seconds, True),  # HPMLL/BurstGPT
)
"""(arrival, prompt, answer, how the first is read, whether time begins with the first request)"""


def read_csv(path: str | Path) -> Iterator[tuple[str, Arrival]]:
    """(where, request) of each line. Raises FormatError naming line and column."""
    with open(path, newline="", encoding="utf-8-sig", errors="strict") as file:
        rows = csv.DictReader(file)
        names = set(rows.fieldnames or ())
        best = max(_FORMATS, key=lambda columns: len(names & set(columns[:3])))
        missing = [name for name in best[:3] if name not in names]
        if missing:
            known = "; ".join(", ".join(columns[:3]) for columns in _FORMATS)
            raise FormatError(f"{path} has no column {missing[0]!r}", f"a trace has the columns {known}")
        at_column, prompt_column, answer_column, read, relative = best
        start: int | None = None
        try:
            for line, row in enumerate(rows, 2):
                where = f"line {line}"
                at = _number(path, where, at_column, row[at_column], read)
                if start is None:
                    start = at if relative else 0
                prompt, answer = (_number(path, where, name, row[name], _tokens) for name in (prompt_column, answer_column))
                yield where, Arrival(at - start, prompt, answer)
        except (csv.Error, UnicodeDecodeError) as error:
            raise FormatError(f"{path} is no CSV file ({error})", "save it as UTF-8 text with commas") from None


def _tokens(text: str) -> int:
    return int(float(text))


def _number(path: str | Path, where: str, column: str, text: str | None, read: Callable[[str], int]) -> int:
    try:
        if text is None:
            raise ValueError
        return read(text)
    except (TypeError, ValueError, OverflowError):
        raise FormatError(
            f"{where} of {path}, column {column!r}: {str(text)[:40]!r} is no {'time' if read is not _tokens else 'number of tokens'}",
            "give numbers, and times as 12.5 or 2023-11-16 18:15:46.68 as the others are",
        ) from None
