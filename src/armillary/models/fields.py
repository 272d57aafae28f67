"""Typed, bounded reading of a JSON object from outside: every complaint names the file and the key."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from armillary.core.errors import FormatError, NotFoundError

MAX_SIZE = 1 << 24  # elements; the largest vocabulary, width or layer count taken seriously
MAX_CONTEXT = 1 << 31  # tokens


def read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The object in a JSON file. Raises NotFoundError, or FormatError when it is too large, no JSON or no object."""
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise FormatError(f"{path.name} has {size:,} bytes, more than {max_bytes:,}", "this cannot be the right file")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise NotFoundError(
            f"{path} cannot be read ({error.strerror})", "give a folder as Hugging Face lays it out, with config.json"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not JSON ({str(error)[:80]})", "fetch the file again") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path.name} holds a {type(value).__name__}, not an object", "fetch the file again")
    return value


class Fields:
    """A JSON object whose absent keys (or null ones) take the family's defaults."""

    def __init__(self, raw: Mapping[str, Any], source: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.raw, self.source, self.defaults = raw, source, defaults or {}

    def get(self, key: str) -> Any:
        """The value; the family's default when the key is absent. A null that is written down stays None."""
        return self.raw[key] if key in self.raw else self.defaults.get(key)

    def fail(self, key: str, problem: str) -> FormatError:
        return FormatError(f"{self.source}: {key} {problem}", "correct the file or fetch it again", field=key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = MAX_SIZE) -> int:
        """A required integer, unless `default` is given."""
        value = self.optional_integer(key, low=low, high=high)
        if value is None and default is None:
            raise self.fail(key, "is missing")
        return default if value is None else value  # type: ignore[return-value]

    def optional_integer(self, key: str, *, low: int = 1, high: int = MAX_SIZE) -> int | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.fail(key, f"is {str(value)[:40]!r}, not an integer")
        if not low <= value <= high:
            raise self.fail(key, f"is {value:,}, outside {low:,} .. {high:,}")
        return value

    def number(self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12) -> float:
        """A required number in (low, high], unless `default` is given."""
        value = self.optional_number(key, low=low, high=high)
        if value is None and default is None:
            raise self.fail(key, "is missing")
        return default if value is None else value  # type: ignore[return-value]

    def optional_number(self, key: str, *, low: float = 0.0, high: float = 1e12) -> float | None:
        value = self.get(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, f"is {str(value)[:40]!r}, not a number")
        if not low < value <= high or not math.isfinite(value):
            raise self.fail(key, f"is {value}, outside ({low:g}, {high:g}]")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"is {str(value)[:40]!r}, not true or false")
        return value

    def string(self, key: str, default: str = "") -> str:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, str):
            raise self.fail(key, f"is {str(value)[:40]!r}, not a string")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """A token id, a list of them, or null: as a tuple without repeats."""
        value = self.get(key)
        values = [] if value is None else value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < MAX_SIZE for i in values) or len(values) > 1024:
            raise self.fail(key, f"is {str(value)[:40]!r}, not a token id or a list of them")
        return tuple(dict.fromkeys(values))
