"""Recorded requests: CSV files in the shape that Vidur and others use, replayed as they came or faster."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from armillary.core.errors import FormatError, InputError
from armillary.core.units import S
from armillary.serve.workload.requests import Arrival

MOST: Final = 20_000_000  # requests
_TOKENS: Final = 1 << 30
_COLUMNS: Final = ("arrived_at", "num_prefill_tokens", "num_decode_tokens")


def read_trace(path: str | Path, *, speed: float = 1.0, most: int | None = None) -> Iterator[Arrival]:
    """The requests of a file, in the order of their arrival, `speed` times as fast; at most the first `most`.

    Columns `arrived_at` (s), `num_prefill_tokens` and `num_decode_tokens`, others are passed over. Raises FormatError naming the line.
    """
    if not (math.isfinite(speed) and speed > 0):
        raise InputError(f"a trace cannot be replayed {speed:g} times as fast", "give more than 0", field="speed")
    with open(path, newline="", encoding="utf-8", errors="strict") as file:
        rows = csv.DictReader(file)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise FormatError(f"{path} has no column {missing[0]!r}", f"a trace has the columns {', '.join(_COLUMNS)}")
        before, count = -1, 0
        for count, row in enumerate(islice(rows, min(MOST, most) if most is not None else MOST), 1):
            try:
                at, prompt, answer = float(row["arrived_at"]), float(row["num_prefill_tokens"]), float(row["num_decode_tokens"])
                arrival = Arrival(round(at * S / speed), int(prompt), int(answer))
            except (TypeError, ValueError, OverflowError):
                raise FormatError(f"line {count + 1} of {path} is no request: {dict(list(row.items())[:4])}", "give numbers") from None
            if not (0 <= arrival.at < 1 << 62 and 1 <= arrival.prompt <= _TOKENS and 1 <= arrival.answer <= _TOKENS):
                raise FormatError(
                    f"line {count + 1} of {path}: {at:g} s, {prompt:g} and {answer:g} tokens", "times from 0 s, at least 1 token each"
                )
            if arrival.at < before:
                raise FormatError(f"line {count + 1} of {path} arrives before the line ahead of it", "sort the trace by arrived_at")
            before = arrival.at
            yield arrival
        if not count:
            raise FormatError(f"{path} has no requests", "a trace has a line for each, after the names of the columns")
