"""Counted repetitions within counted repetitions: what makes a grammar slow to follow, bounded before anything is compiled.

`(a{1,100}){1,100}` can be read in so many ways that following it takes seconds a token, in a call that nothing can interrupt.
"""

from __future__ import annotations

import re

from armillary.core.errors import InputError

MAX_REPEAT = 10_000  # of one `{m,n}`
MAX_NESTED = 64  # the product of counts that enclose one another

_COUNT = re.compile(r"\{\s*(\d*)\s*(,?)\s*(\d*)\s*\}")


def check_repeats(text: str, field: str, *, literals: bool = False) -> None:
    """Raises InputError for counts in `text`, a regular expression, or GBNF with `literals` in quotes, that are too large alone or together."""
    inner = [1]  # of each open group: the largest product of counts in it
    last = 1  # of the element just read
    position = 0
    while position < len(text):
        character = text[position]
        if character == "\\":
            position, last = position + 2, 1
            continue
        if literals and character == '"':
            position, last = _literal_end(text, position), 1
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
                raise InputError(
                    f"{field}: a repetition of {match[0]} at character {position}", f"repeat at most {MAX_REPEAT:,} times", field=field
                )
            product = max(count, 1) * last
            if last > 1 and product > MAX_NESTED:
                raise InputError(
                    f"{field}: repetitions within the repetition {match[0]} at character {position} come to {product:,} times",
                    f"keep their product under {MAX_NESTED + 1}, or use * and + where the count does not matter",
                    field=field,
                )
            inner[-1] = max(inner[-1], product)
            position, last = match.end(), product
            continue
        elif character not in "*+? \t\r\n":
            last = 1
        position += 1


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
