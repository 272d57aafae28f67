"""Counted repetitions within counted repetitions: what makes a grammar slow to follow, bounded before anything is compiled.

`(a{1,100}){1,100}` can be read in so many ways that following it takes seconds a token, in a call that nothing can interrupt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import zip_longest

from armillary.core.errors import InputError

MAX_REPEAT = 10_000  # of one `{m,n}`
MAX_NESTED = 1_000  # the product of counts that enclose one another

MAX_ROUNDS = 32  # of rules that refer to one another
_NAME = re.compile(r"[A-Za-z_][\w-]*")
_RULE = re.compile(r"^[ \t]*([A-Za-z_][\w-]*)[ \t]*::=", re.MULTILINE)
_COUNT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")


def check_repeats(pattern: str, field: str) -> None:
    """Raises InputError for counts in a regular expression that are too large, alone or together."""
    _largest(pattern, field, None)


def check_rules(grammar: str, field: str) -> None:
    """The same for GBNF, whose counts enclose one another through the names of rules too."""
    bodies: dict[str, str] = {}
    starts = list(_RULE.finditer(grammar))
    for match, following in zip_longest(starts, starts[1:]):
        bodies[match[1]] = bodies.get(match[1], "") + " | " + grammar[match.end() : following.start() if following else None]
    within = dict.fromkeys(bodies, 1)
    for _ in range(MAX_ROUNDS):
        found = {name: _largest(body, field, within) for name, body in bodies.items()}
        if found == within:
            return
        within = found
    raise InputError(f"{field}: its rules repeat one another through more than {MAX_ROUNDS} levels", "make it flatter", field=field)


def _largest(text: str, field: str, within: Mapping[str, int] | None) -> int:
    """The largest product of counts that enclose one another in `text`; with `within`, the products of named rules, it is GBNF."""
    inner = [1]  # of each open group: the largest product in it
    last = 1  # of the element just read
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position, last = position + 2, 1
            continue
        if within is not None and character == '"':
            position, last = _literal_end(text, position), 1
            continue
        if within is not None and character == "#":
            position = (text.find("\n", position) + 1) or len(text)
            continue
        if within is not None and (match := _NAME.match(text, position)):
            position, last = match.end(), within.get(match[0], 1)
            inner[-1] = max(inner[-1], last)
            continue
        if character == "[":
            position, last = _class_end(text, position), 1
            continue
        if character == "(":
            inner.append(1)
        elif character == ")":
            last = inner.pop() if len(inner) > 1 else 1
            inner[-1] = max(inner[-1], last)
        elif character == "{" and (match := _COUNT.match(text, position)):
            count = int((match[3] or match[1] or "1")[:12])
            if count > MAX_REPEAT:
                raise InputError(f"{field}: a repetition of {match[0]}", f"repeat at most {MAX_REPEAT:,} times", field=field)
            product = max(count, 1) * last
            if last > 1 and product > MAX_NESTED:
                raise InputError(
                    f"{field}: repetitions within the repetition {match[0]} come to {product:,} times",
                    f"keep their product to {MAX_NESTED:,}, or use * and + where the count does not matter",
                    field=field,
                )
            inner[-1] = max(inner[-1], product)
            position, last = match.end(), product
            continue
        elif character not in "*+? \t\r\n":
            last = 1
        position += 1
    return max(inner)


def _literal_end(text: str, start: int) -> int:
    """Past the literal that begins at `start`."""
    position = start + 1
    while position < len(text) and text[position] != '"':
        position += 2 if text[position] == "\\" else 1
    return position + 1


def _class_end(text: str, start: int) -> int:
    """Past the character class that begins at `start`."""
    position = start + 2 if text[start + 1 : start + 2] == "^" else start + 1
    while position < len(text) and text[position] != "]":
        position += 2 if text[position] == "\\" else 1
    return position + 1
