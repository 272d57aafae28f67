"""Anchors of a regular expression that stands for a whole text: those that say so again go, those that could never hold are refused.

xgrammar drops an anchor within an expression and takes an escape that it does not know for the character itself, with no more than a
warning on stderr: `a^b` would be followed as `ab`, `\\Aab` as `Aab`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from armillary.core.errors import InputError

_TOKEN = re.compile(
    r"""
    (?P<start> \^ | \\A ) | (?P<end> \$ | \\[Zz] )
  | (?P<open> \( (?: \?: | \?P?<[A-Za-z_]\w*> )? ) | (?P<close> \) ) | (?P<bar> \| )
  | (?P<count> (?: [*+?] | \{\s*\d*\s*,?\s*\d*\s*\} ) \??)
  | (?P<escape> \\. )
  | (?P<atom> \[ \^? \]? (?: \\. | [^\]\\] )* \]? | . )
    """,
    re.VERBOSE | re.DOTALL,
)
_ESCAPE = re.compile(r"\\.", re.DOTALL)
_UNKNOWN = re.compile(r"\\[A-Za-z]")
_KNOWN = frozenset("acdefnrstuvwxDSW" + "bBkpP")  # the last five xgrammar refuses in its own words

Token = tuple[str, str]


def unanchored(pattern: str, field: str) -> str:
    """`pattern` without anchors. Raises InputError for one that is neither at the beginning nor at the end, and for unknown escapes."""
    tokens = [(str(match.lastgroup), match[0]) for match in _TOKEN.finditer(pattern)]
    for kind, text in tokens:
        for escape in _ESCAPE.findall(text) if kind in ("escape", "atom") else ():
            if _UNKNOWN.match(escape) and escape[1] not in _KNOWN:
                raise InputError(f"{field}: the escape {escape!r} is not known", "write the character itself, or a class", field=field)
    _check(tokens, "start", ("open", "close"), field)
    _check(tokens[::-1], "end", ("close", "open"), field)
    kept = "".join(text for kind, text in tokens if kind not in ("start", "end"))
    return kept or "^$"


def _check(tokens: Sequence[Token], anchor: str, brackets: tuple[str, str], field: str) -> None:
    """Read from the side of `anchor`: each one has nothing but other anchors between it and that side, and is not repeated."""
    opening, closing = brackets
    at_side, groups = True, [True]  # here; where each open group, and each of its alternatives, begins
    anchored = [False]  # whether each open group has an anchor in it
    for index, (kind, text) in enumerate(tokens):
        if kind == anchor:
            counted = tokens[index - 1 : index] if anchor == "end" else tokens[index + 1 : index + 2]
            if not at_side or (counted and counted[0][0] == "count"):
                where = "the beginning" if anchor == "start" else "the end"
                raise InputError(
                    f"{field}: {text!r} stands where {where} of the text cannot be",
                    "leave it out: the expression stands for the whole text",
                    field=field,
                )
            anchored[-1] = True
        elif kind == opening:
            groups.append(at_side)
            anchored.append(False)
        elif kind == closing:
            at_side = False
            if len(groups) > 1:
                groups.pop()
                if anchored.pop():
                    anchored[-1] = True
                    _check_count(tokens, index, anchor, field)
        elif kind == "bar":
            at_side = groups[-1]
        elif kind != "count" and kind not in ("start", "end"):
            at_side = False


def _check_count(tokens: Sequence[Token], closed: int, anchor: str, field: str) -> None:
    """A group with an anchor in it must not be repeated; it ends at `closed`, on the side where `anchor` is not."""
    if anchor == "start":
        count = tokens[closed + 1 : closed + 2]
    else:  # read backwards: the count stands before the bracket that was read first
        depth, index = 0, closed
        while index >= 0:
            depth += (tokens[index][0] == "open") - (tokens[index][0] == "close")
            if depth == 0:
                break
            index -= 1
        count = tokens[max(index - 1, 0) : index]
    if count and count[0][0] == "count" and not count[0][1].startswith("?"):
        raise InputError(f"{field}: a group with an anchor in it is repeated", "leave the anchor out", field=field)
