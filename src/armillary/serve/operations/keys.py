"""Who has a key, what they are called, and how much each may ask for."""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from armillary.core.config import Config, load_toml
from armillary.core.errors import InputError

NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class KeyLimits(Config):
    """One table of a keys file: `[name]`, `key = "..."`, and what it may ask for a minute."""

    key: str = Field(min_length=1, max_length=512)
    """What clients send as a bearer token."""
    requests_per_minute: int | None = Field(None, ge=1, le=1 << 31)
    """POST requests; none is any number."""
    tokens_per_minute: int | None = Field(None, ge=1, le=1 << 53)
    """Tokens of prompts and answers; none is any number."""


@dataclass(frozen=True, slots=True)
class ApiKey:
    """A key by its name; the key itself is kept as a digest only."""

    name: str
    digest: bytes
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None

    @classmethod
    def of(cls, name: str, key: str, requests_per_minute: int | None = None, tokens_per_minute: int | None = None) -> ApiKey:
        if not key.strip():
            raise InputError("the API key is empty", "give one with at least one character, or none at all", field="api_key")
        return cls(name, _digest(key.encode()), requests_per_minute, tokens_per_minute)


class KeyRing:
    """All keys of a server."""

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self.keys: tuple[ApiKey, ...] = tuple(keys)
        seen: dict[bytes, str] = {}
        for key in self.keys:
            if key.digest in seen:
                raise InputError(f"the keys {seen[key.digest]!r} and {key.name!r} are the same", "give each its own", field="api_key")
            seen[key.digest] = key.name
        if len({key.name for key in self.keys}) != len(self.keys):
            raise InputError("two keys have the same name", "name the tables of the keys file other than key-1, key-2, ...", field="keys")

    @classmethod
    def of(cls, keys: Sequence[str], file: Path | None = None) -> KeyRing:
        """Keys without limits, called `key-1`, `key-2`, ..., and those of a TOML file, one table a key.

        Raises InputError, NotFoundError or FormatError; no message has a key in it.
        """
        ring = [ApiKey.of(f"key-{number}", key) for number, key in enumerate(keys, 1)]
        return cls([*ring, *(_in_file(file) if file is not None else ())])

    def owner(self, given: bytes) -> ApiKey | None:
        """Whose key this is. The time that it takes tells nothing of how much of which key was right."""
        digest, found = _digest(given), None
        for key in self.keys:
            if hmac.compare_digest(digest, key.digest):
                found = key
        return found


def _in_file(file: Path) -> list[ApiKey]:
    found = []
    for name, table in load_toml(file).items():
        if not NAME.fullmatch(name):
            raise InputError(f"{file}: {name[:80]!r} names no key", "use 1 to 64 letters, digits, '_', '.' or '-'", field="keys")
        if not isinstance(table, dict):
            raise InputError(f"{file}: {name} is no table", f"write [{name}] and below it key = ...", field="keys")
        unknown = sorted(table.keys() - KeyLimits.model_fields.keys())
        if unknown:
            raise InputError(f"{file}: [{name}] has {unknown[0][:80]!r}", f"known are {', '.join(KeyLimits.model_fields)}", field="keys")
        try:
            limits = KeyLimits.model_validate(table)
        except ValueError as error:  # whose text quotes the input, which may be the key
            raise InputError(
                f"{file}: [{name}] is not right in {_fields(error)}",
                "key is a string of 1 to 512 characters, limits are whole numbers over 0",
                field="keys",
            ) from None
        found.append(ApiKey.of(name, limits.key, limits.requests_per_minute, limits.tokens_per_minute))
    if not found:
        raise InputError(f"{file} has no key", 'write [a-name] and below it key = "..."', field="keys")
    return found


def _fields(error: ValueError) -> str:
    problems = error.errors(include_input=False, include_url=False) if hasattr(error, "errors") else []
    return ", ".join(str(problem["loc"][-1]) for problem in problems if problem["loc"]) or "its keys"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
