"""What an answer must look like, as plain data: checked and bounded here, compiled by `compiler`, followed by `matcher`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from armillary.core.errors import InputError
from armillary.serve.grammar.anchors import unanchored
from armillary.serve.grammar.json_schema import MAX_DEPTH, followed
from armillary.serve.grammar.repeats import check_repeats, check_rules

Kind = Literal["json_schema", "regex", "ebnf", "structural_tag"]

MAX_CHARACTERS = 65_536  # of a schema or a grammar
MAX_REGEX_CHARACTERS = 4_096
MAX_CHOICES = 1_024
MAX_WHITESPACE = 8  # characters in a row between the parts of JSON: a model may indent, but not write spaces without end


@dataclass(frozen=True, slots=True)
class Grammar:
    """`source` is what xgrammar compiles: a JSON schema, a regular expression, GBNF, or a structural tag as JSON.

    `spaces` bounds the whitespace between the parts of JSON: None for the only way that `json.dumps` writes it.
    `field` is where it came from, for errors. Two grammars of the same text are equal, and compiled once.
    """

    kind: Kind
    source: str
    spaces: int | None = MAX_WHITESPACE
    field: str = "grammar"

    @property
    def key(self) -> tuple[str, str, int | None]:
        return self.kind, self.source, self.spaces


def json_schema(schema: Any, *, field: str = "json", spaces: int | None = MAX_WHITESPACE) -> Grammar:
    """JSON that is valid under `schema` (a mapping, or its JSON text). Raises InputError that names the place of what cannot be followed."""
    if isinstance(schema, str):
        _bounded(schema, MAX_CHARACTERS, field)
        try:
            schema = json.loads(schema)
        except RecursionError:
            raise InputError(
                f"{field} is nested too deep", f"a schema has at most {MAX_DEPTH} levels: make it flatter", field=field
            ) from None
        except ValueError as error:
            raise InputError(f"{field} is not JSON ({str(error)[:80]})", "send an object", field=field) from None
    source = json.dumps(followed(schema, field), ensure_ascii=False, separators=(",", ":"))
    return Grammar("json_schema", _bounded(source, MAX_CHARACTERS, field), spaces, field)


def json_object(*, field: str = "json_object", spaces: int | None = MAX_WHITESPACE) -> Grammar:
    """Any JSON object."""
    return json_schema({"type": "object"}, field=field, spaces=spaces)


def regex(pattern: str, *, field: str = "regex") -> Grammar:
    """Text that `pattern` matches from its first character to its last."""
    _bounded(pattern, MAX_REGEX_CHARACTERS, field)
    check_repeats(pattern, field)
    return Grammar("regex", unanchored(pattern, field), None, field)


def choice(choices: Sequence[str], *, field: str = "choice") -> Grammar:
    """One of `choices`."""
    if not 1 <= len(choices) <= MAX_CHOICES:
        raise InputError(f"{field} has {len(choices)} choices", f"give 1 to {MAX_CHOICES:,}", field=field)
    if "" in choices:
        raise InputError(f"{field}: a choice is empty", "give each at least one character", field=field)
    source = json.dumps({"type": "or", "elements": [{"type": "const_string", "value": one} for one in dict.fromkeys(choices)]})
    return structural_tag(json.loads(source), field=field)


def ebnf(text: str, *, field: str = "grammar") -> Grammar:
    """Text that the rule `root` of a grammar in GBNF (llama.cpp's notation) derives."""
    _bounded(text, MAX_CHARACTERS, field)
    check_rules(text, field)
    return Grammar("ebnf", text, None, field)


def structural_tag(tag: Mapping[str, Any], *, field: str = "structural_tag") -> Grammar:
    """xgrammar's own format for text with marked parts, for what this package builds itself: it is not checked here."""
    source = json.dumps({"type": "structural_tag", "format": tag}, ensure_ascii=False, separators=(",", ":"))
    return Grammar("structural_tag", _bounded(source, 4 * MAX_CHARACTERS, field), None, field)


def _bounded(text: str, most: int, field: str) -> str:
    if not text:
        raise InputError(f"{field} is empty", "give at least one character", field=field)
    if len(text) > most:
        raise InputError(f"{field} has {len(text):,} characters; at most {most:,} are compiled", "make it shorter", field=field)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{field} has a lone surrogate", "send valid Unicode", field=field) from None
    if "\0" in text:
        raise InputError(f"{field} has a NUL character", "leave it out", field=field)
    return text
