"""The access log: one JSON line an exchange, with numbers and names, never a text and never a key."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from armillary.core.errors import InputError
from armillary.core.units import MS
from armillary.serve.http.exchange import Exchange
from armillary.serve.request import Request

LONGEST_PATH = 200

log = logging.getLogger(__name__)


class AccessLog:
    """Appends to a file, or writes to stdout for "-". Each line is whole when it is written, so that the file can be followed.

    A disk that is full, or a reader of stdout that has gone, costs lines and no answer: the first is told, and how many when writing works again.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lost = 0

    @classmethod
    def open(cls, path: str) -> AccessLog:
        """Raises InputError when the file cannot be written."""
        if path == "-":
            return cls(sys.stdout)
        try:
            # Without a buffer a line that could not be written is gone, rather than in the way of those after it.
            return cls(io.TextIOWrapper(Path(path).open("ab", buffering=0), encoding="utf-8", write_through=True))
        except OSError as error:
            raise InputError(
                f"the access log {path} cannot be written: {error.strerror}",
                "give a file in a folder that exists, or -",
                field="access_log",
            ) from error

    def __call__(self, exchange: Exchange) -> None:
        try:
            self._stream.write(json.dumps(line(exchange), ensure_ascii=True) + "\n")
            if self._stream is sys.stdout:
                self._stream.flush()
        except OSError as error:
            if not self._lost:
                log.error("the access log cannot be written (%s): lines are lost until it can", error.strerror)
            self._lost += 1
        else:
            if self._lost:
                log.warning("the access log is written again: %d lines are lost", self._lost)
            self._lost = 0


def line(exchange: Exchange) -> dict[str, Any]:
    """What the log says of an exchange. Durations in ms; `first_byte_ms` is the answer's head, a token comes later in a stream.

    `queue_ms`, `prefill_ms` and `decode_ms` are of the request that took longest when there were several choices.
    """
    said: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": exchange.id,
        "method": exchange.method,
        "path": exchange.path[:LONGEST_PATH],
        "status": exchange.status,
        "key": exchange.key,
        "duration_ms": _ms(exchange.start, exchange.end),
        "first_byte_ms": _ms(exchange.start, exchange.first_byte),
        "client_left": exchange.left,
    }
    if exchange.requests:
        longest = max(exchange.requests, key=lambda request: request.finished or 0)
        said |= {
            "choices": len(exchange.requests),
            "prompt_tokens": sum(len(request.prompt) for request in exchange.requests),
            "cached_tokens": sum(request.reused for request in exchange.requests),
            "completion_tokens": sum(len(request.output) for request in exchange.requests),
            "finish_reasons": sorted({request.finish_reason or "cancelled" for request in exchange.requests}),
            "preemptions": sum(request.preemptions for request in exchange.requests),
            **durations(longest),
        }
    return said


def durations(request: Request) -> dict[str, float | None]:
    """The three parts of a request's life in ms; None for those that it did not come to."""
    return {
        "queue_ms": _ms(request.arrival, request.first_scheduled),
        "prefill_ms": _ms(request.first_scheduled, request.first_token),
        "decode_ms": _ms(request.first_token, request.last_token),
    }


def _ms(start: int | None, end: int | None) -> float | None:
    return round((end - start) / MS, 3) if start is not None and end is not None else None
