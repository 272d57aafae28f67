"""Traces in JSON lines: Mooncake's, which say what prompts share, and the access log of our own server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import FormatError
from armillary.core.units import MS, S
from armillary.serve.workload.requests import Arrival

_BLOCK: Final = 512  # tokens that a hash of Mooncake's stands for
_LONGEST: Final = 1 << 22  # characters of a line
_MOST: Final = 4_000_000  # lines of an access log, which is sorted in memory
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def read_mooncake(path: str | Path) -> Iterator[tuple[str, Arrival]]:
    """(where, request) of each line: `timestamp` (ms), `input_length`, `output_length` and `hash_ids`, each of which stands for 512 tokens and
    for all before them (Qin et al., Mooncake, FAST 2025), so that prompts with the same first ids begin alike."""
    known: set[int] = set()
    for number, (where, line) in enumerate(_lines(path)):
        at, prompt, answer = (_whole(path, where, line, name) for name in ("timestamp", "input_length", "output_length"))
        ids = line.get("hash_ids", [])
        if not isinstance(ids, list) or not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < 1 << 62 for one in ids):
            raise FormatError(f"{where} of {path}, field 'hash_ids': {str(ids)[:40]} are no hashes", "give whole numbers in brackets")
        content, left, shared, alike = list[tuple[int, int]](), prompt, 0, True
        for one in ids:
            count = min(_BLOCK, left)
            if not count:
                break
            content.append((one + 1, count))
            alike = alike and one in known
            shared += count if alike else 0
            left -= count
            known.add(one)
        if left:
            content.append((-1 - number, left))
        yield where, Arrival(at * MS, prompt, answer, content=tuple(content), shared=shared)


def read_access_log(path: str | Path) -> Iterator[tuple[str, Arrival]]:
    """(where, request) of each line that has tokens, of `serve --access-log`; each choice of an answer is one that shares its prompt."""
    found: list[tuple[int, str, dict[str, Any]]] = []
    for where, line in _lines(path):
        if line.get("prompt_tokens"):
            found.append((_arrival(path, where, line), where, line))
        if len(found) > _MOST:
            raise FormatError(f"{path} has more than {_MOST:,} requests", "give a part of it")
    found.sort(key=lambda one: one[0])
    for number, (at, where, line) in enumerate(found):
        choices = max(1, _whole(path, where, line, "choices")) if "choices" in line else 1
        prompt, answer = (_whole(path, where, line, name) for name in ("prompt_tokens", "completion_tokens"))
        each = prompt // choices
        for choice in range(choices):
            own = answer // choices + (choice < answer % choices)
            content = ((number + 1, each),) if choices > 1 else ()
            name = f"{line['request_id']}-{choice}" if choices > 1 else str(line["request_id"])
            yield where, Arrival(at - found[0][0], each, own, name[:200], content, each if choice else 0)


def _arrival(path: str | Path, where: str, line: dict[str, Any]) -> int:
    """ns since 1970: a line is written when its answer has ended."""
    try:
        ended = datetime.fromisoformat(line["time"]) - _EPOCH
        return (ended.days * 86_400 + ended.seconds) * S + ended.microseconds * 1000 - round(float(line["duration_ms"]) * MS)
    except (KeyError, TypeError, ValueError, OverflowError):
        raise FormatError(
            f"{where} of {path}, fields 'time' and 'duration_ms': {str(line.get('time'))[:40]!r} and {str(line.get('duration_ms'))[:40]!r}",
            "give an access log as the server wrote it",
        ) from None


def _lines(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8-sig", errors="strict") as file:
        number = 0
        try:
            while text := file.readline(_LONGEST):
                number += 1
                if text.isspace():
                    continue
                line = json.loads(text)
                if not isinstance(line, dict):
                    raise ValueError("a JSON object belongs there")
                yield f"line {number}", line
        except (ValueError, RecursionError) as error:
            raise FormatError(f"line {number} of {path} is no JSON object ({error})", "give one object a line") from None


def _whole(path: str | Path, where: str, line: dict[str, Any], name: str) -> int:
    value = line.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1 << 50:
        raise FormatError(f"{where} of {path}, field {name!r}: {str(value)[:40]!r} is no count", "give a number from 0")
    return int(value)
