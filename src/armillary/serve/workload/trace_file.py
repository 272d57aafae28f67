"""Recorded requests: traces that others publish, and what our own server has written, replayed as they came or faster."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.serve.workload.requests import Arrival
from armillary.serve.workload.trace_csv import read_csv
from armillary.serve.workload.trace_lines import read_access_log, read_mooncake
from armillary.serve.workload.trace_spans import read_spans

MOST: Final = 20_000_000  # requests
_TOKENS: Final = 1 << 30
_FIRST_LINE: Final = 1 << 20  # characters


@dataclass(slots=True)
class Recorded:
    """The requests of a file, in the order of their arrival, `speed` times as fast; at most the first `most`.

    Which of these it is, is seen from its beginning: a CSV file with the columns of Vidur, of the Azure LLM inference traces or of BurstGPT;
    JSON lines as Mooncake's, whose blocks are shared; our server's access log; a trace of our engine, with what its prompts shared.
    Those without an answer are passed over, and `unanswered` counts them. One that exceeds `limit` tokens is refused, or with `cut` made to
    fit, its answer first, and `shortened` counts those. `asked` tokens of prompts came, `shared` of them as others' began.

    Iterating raises FormatError naming the line (and the column), or InputError.
    """

    path: str | Path
    speed: float = 1.0
    most: int | None = None
    limit: int | None = None
    cut: bool = False
    unanswered: int = 0
    shortened: int = 0
    asked: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.speed) and self.speed > 0):
            raise InputError(f"a trace cannot be replayed {self.speed:g} times as fast", "give more than 0", field="speed")

    def __iter__(self) -> Iterator[Arrival]:
        self.unanswered = self.shortened = self.asked = self.shared = 0
        before, count = 0, 0
        for where, found in islice(self._rows(), MOST):
            if not found.answer:
                self.unanswered += 1
                continue
            if self.most is not None and count == self.most:
                return
            if count and found.at < before:
                raise FormatError(f"{where} of {self.path} arrives before the one ahead of it", "sort the trace by arrival")
            before, count, at = found.at, count + 1, found.at if self.speed == 1 else round(found.at / self.speed)
            if not (0 <= at < 1 << 62 and 1 <= found.prompt <= _TOKENS and 1 <= found.answer <= _TOKENS):
                raise FormatError(
                    f"{where} of {self.path}: {found.at / 1e9:g} s, {found.prompt:,} and {found.answer:,} tokens",
                    "times from 0 s, at least 1 token each",
                )
            arrival = self._fitting(where, replace(found, at=at))
            self.asked += arrival.prompt
            self.shared += arrival.shared
            yield arrival
        if not count:
            raise FormatError(f"{self.path} has no requests", "a trace has one for each line, or is of an engine that answered some")

    def _rows(self) -> Iterator[tuple[str, Arrival]]:
        """(where in the file, request)"""
        try:
            with open(self.path, encoding="utf-8-sig", errors="strict") as file:
                first = file.readline(_FIRST_LINE)
        except OSError as error:
            raise NotFoundError(f"cannot read the trace {self.path} ({error.strerror})", "check the path") from error
        except UnicodeDecodeError:
            raise FormatError(f"{self.path} is no text", "give a CSV file, JSON lines, or a trace that Armillary saved") from None
        if not first:
            raise FormatError(f"{self.path} is empty", "a trace has a line for each request, or is of an engine that answered some")
        if not first.lstrip().startswith(("{", "[")):
            return read_csv(self.path)
        try:
            line = json.loads(first)
        except (ValueError, RecursionError):
            return read_spans(self.path)
        if isinstance(line, dict) and "input_length" in line:
            return read_mooncake(self.path)
        if isinstance(line, dict) and "request_id" in line:
            return read_access_log(self.path)
        return read_spans(self.path)

    def _fitting(self, where: str, found: Arrival) -> Arrival:
        limit = self.limit
        if limit is None or found.prompt + found.answer <= limit:
            return found
        if not self.cut:
            raise InputError(
                f"{where} of {self.path}: {found.prompt:,} and {found.answer:,} tokens are more than the context of {limit:,}",
                "give --cut to make such requests fit, or another model",
                field="trace",
            )
        self.shortened += 1
        return found.within(limit)
