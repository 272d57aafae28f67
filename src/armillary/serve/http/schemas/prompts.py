"""Texts or token ids, one or several: what completions continue and embeddings embed."""

from __future__ import annotations

from typing import Any


def prompts(value: Any, most: int, noun: str) -> list[Any]:
    """A string, a list of token ids, or a list of either, as a list of strings and lists of ids. Raises ValueError for all else."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise ValueError("send a string, a list of strings, a list of token ids, or a list of such lists; none of them empty")
    if _is_tokens(value):
        return [value]
    if len(value) > most:
        raise ValueError(f"{len(value)} {noun}s: send at most {most} in one request")
    for index, one in enumerate(value):
        if not isinstance(one, str) and not _is_tokens(one):
            if one == []:
                raise ValueError(f"{noun} {index} is empty: leave it out, or send at least one token id")
            raise ValueError(f"{noun} {index} is neither a string nor a list of token ids")
    return value


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
