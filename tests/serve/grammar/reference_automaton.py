"""The plainest grammar engine: a regular expression or a JSON schema to an automaton over bytes, and every token of a vocabulary walked through it.

Independent of xgrammar: regular expressions are read by Python's own parser, JSON by the rules of RFC 8259. No recursion: schemas of finite depth.
"""

from __future__ import annotations

import json
import re._constants as names
import re._parser as parser
from collections.abc import Iterable, Sequence

import numpy as np

# A piece is a nested tuple: ("bytes", low, high), ("seq", ...), ("alt", ...), ("repeat", low, high or None, piece).
EMPTY = ("seq",)


def text(value: str):
    return ("seq", *(("bytes", byte, byte) for byte in value.encode()))


def seq(*pieces):
    return ("seq", *pieces)


def alt(*pieces):
    return ("alt", *pieces)


def repeat(piece, low: int, high: int | None):
    return ("repeat", low, high, piece)


def characters(ranges: Iterable[tuple[int, int]]):
    """Any one character of these ranges of code points, as UTF-8."""
    pieces = []
    for low, high in ranges:
        for start, end in ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xFFFF), (0x10000, 0x10FFFF)):
            a, b = max(low, start), min(high, end)
            if a <= b:
                pieces += _same_length(chr(a).encode("utf-8", "surrogatepass"), chr(b).encode("utf-8", "surrogatepass"))
    return alt(*pieces)


def _same_length(low: bytes, high: bytes):
    """Byte sequences from `low` to `high`, whose following bytes range over 80..BF."""
    if len(low) == 1:
        return [("bytes", low[0], high[0])]
    if low[0] == high[0]:
        return [seq(("bytes", low[0], low[0]), rest) for rest in _same_length(low[1:], high[1:])]
    rest = len(low) - 1
    pieces = []
    first, last = low[0], high[0]
    if low[1:] != b"\x80" * rest:
        pieces += [seq(("bytes", first, first), one) for one in _same_length(low[1:], b"\xbf" * rest)]
        first += 1
    if high[1:] != b"\xbf" * rest:
        pieces += [seq(("bytes", last, last), one) for one in _same_length(b"\x80" * rest, high[1:])]
        last -= 1
    if first <= last:
        pieces.append(seq(("bytes", first, last), *[("bytes", 0x80, 0xBF)] * rest))
    return pieces


def without(removed: str, floor: int = 0):
    """Any character from `floor` on but these."""
    ranges, low = [], floor
    for code in sorted({ord(one) for one in removed}):
        if code >= low:
            if code > low:
                ranges.append((low, code - 1))
            low = code + 1
    return characters([*ranges, (low, 0x10FFFF)])


# -- regular expressions ------------------------------------------------------------------------------------------------

_CLASSES = {
    names.CATEGORY_DIGIT: [(48, 57)],
    names.CATEGORY_WORD: [(48, 57), (65, 90), (95, 95), (97, 122)],
}


def regex(pattern: str, *, floor: int = 0, banned: str = ""):
    """The whole of `pattern`; a dot is any character from `floor` on but `banned`, line breaks too (xgrammar's reading, and docs/http.md's)."""
    return _parsed(parser.parse(pattern), floor, banned)


def _parsed(tree, floor, banned):
    return seq(*(_one(op, argument, floor, banned) for op, argument in tree))


def _one(op, argument, floor, banned):
    if op is names.LITERAL:
        return text(chr(argument))
    if op is names.NOT_LITERAL:
        return without(chr(argument) + banned, floor)
    if op is names.ANY:
        return without(banned, floor)
    if op is names.IN:
        ranges, negated = [], False
        for kind, value in argument:
            if kind is names.NEGATE:
                negated = True
            elif kind is names.LITERAL:
                ranges.append((value, value))
            elif kind is names.RANGE:
                ranges.append(value)
            else:
                ranges += _CLASSES[value]
        if negated:
            return without("".join(chr(code) for low, high in ranges for code in range(low, high + 1)) + banned, floor)
        return characters(ranges)
    if op is names.BRANCH:
        return alt(*(_parsed(branch, floor, banned) for branch in argument[1]))
    if op is names.SUBPATTERN:
        return _parsed(argument[3], floor, banned)
    if op in (names.MAX_REPEAT, names.MIN_REPEAT):
        low, high, inner = argument
        return repeat(_parsed(inner, floor, banned), low, None if high is names.MAXREPEAT else high)
    if op is names.AT:
        return EMPTY
    raise NotImplementedError(op)


# -- JSON ---------------------------------------------------------------------------------------------------------------

_BARE = {"floor": 0x20, "banned": '"\\'}  # what JSON writes without an escape
_HEX = alt(("bytes", 48, 57), ("bytes", 65, 70), ("bytes", 97, 102))
_STRING = seq(
    text('"'),
    repeat(alt(without('"\\', 0x20), seq(text("\\"), alt(*map(text, '"\\/bfnrt'), seq(text("u"), _HEX, _HEX, _HEX, _HEX)))), 0, None),
    text('"'),
)
_DIGITS = repeat(("bytes", 48, 57), 1, None)
_WHOLE = alt(text("0"), seq(("bytes", 49, 57), repeat(("bytes", 48, 57), 0, None)))
_INTEGER = alt(text("0"), seq(repeat(text("-"), 0, 1), ("bytes", 49, 57), repeat(("bytes", 48, 57), 0, None)))
_NUMBER = seq(
    repeat(text("-"), 0, 1),
    _WHOLE,
    repeat(seq(text("."), _DIGITS), 0, 1),
    repeat(seq(alt(text("e"), text("E")), repeat(alt(text("+"), text("-")), 0, 1), _DIGITS), 0, 1),
)


def schema(node: dict, spaces: int | None):
    """JSON valid under `node`, properties in its order, at most `spaces` characters of whitespace in a row (None: as json.dumps writes)."""
    gap = EMPTY if spaces is None else repeat(alt(*map(text, " \n\r\t")), 0, spaces)
    comma, colon = (text(", "), text(": ")) if spaces is None else (seq(gap, text(","), gap), seq(gap, text(":"), gap))
    if "anyOf" in node:
        return alt(*(schema(one, spaces) for one in node["anyOf"]))
    if "enum" in node or "const" in node:
        values = node.get("enum", [node.get("const")])
        return alt(*(text(json.dumps(value, ensure_ascii=False, separators=(",", ":"))) for value in values))
    kind = node["type"]
    if isinstance(kind, list):
        return alt(*(schema({**node, "type": one}, spaces) for one in kind))
    if kind == "string":
        if "pattern" in node:
            return seq(text('"'), regex(node["pattern"], **_BARE), text('"'))
        if "minLength" in node or "maxLength" in node:
            return seq(text('"'), repeat(without('"\\', 0x20), node.get("minLength", 0), node.get("maxLength")), text('"'))
        return _STRING
    if kind == "integer":
        if "minimum" in node and "maximum" in node:
            return alt(*(text(str(value)) for value in range(node["minimum"], node["maximum"] + 1)))
        return _INTEGER
    if kind in ("number", "boolean", "null"):
        return {"number": _NUMBER, "boolean": alt(text("true"), text("false")), "null": text("null")}[kind]
    if kind == "array":
        low, high, item = node.get("minItems", 0), node.get("maxItems"), schema(node["items"], spaces)
        more = seq(item, repeat(seq(comma, item), max(low - 1, 0), None if high is None else high - 1))
        some = seq(text("["), gap, more, gap, text("]"))
        return some if low else alt(seq(text("["), gap, text("]")), some)
    assert kind == "object"
    fields = [
        (seq(text(json.dumps(name, ensure_ascii=False)), colon, schema(one, spaces)), name in node.get("required", ()))
        for name, one in node["properties"].items()
    ]
    bodies = _listed(fields, comma)
    some = seq(text("{"), gap, bodies, gap, text("}"))
    return some if any(wanted for _, wanted in fields) else alt(seq(text("{"), gap, text("}")), some)


def _listed(fields, comma):
    """At least one of the fields, all that are required, in order, with commas between."""
    starts = []
    for index, (first, _) in enumerate(fields):
        rest = [seq(comma, one) if wanted else repeat(seq(comma, one), 0, 1) for one, wanted in fields[index + 1 :]]
        starts.append(seq(first, *rest))
        if fields[index][1]:
            break
    return alt(*starts)


# -- the automaton ------------------------------------------------------------------------------------------------------


class Automaton:
    """States are sets of places in the expression; `next` finds, and remembers, what a byte leads to."""

    def __init__(self, piece) -> None:
        self._edges: list[list[tuple[int, int, int]]] = []  # byte ranges and where they lead
        self._silent: list[list[int]] = []
        end = self._place()
        self._end = end
        start = self._build(piece, end)
        self._sets: dict[frozenset[int], int] = {}
        self._members: list[frozenset[int]] = []
        self.dead = self._state(frozenset())
        self.start = self._state(self._closed({start}))
        cuts = sorted(
            {0, 256, *(low for place in self._edges for low, _, _ in place), *(high + 1 for place in self._edges for _, high, _ in place)}
        )
        self.classes = np.repeat(np.arange(len(cuts) - 1), np.diff(cuts))  # [256]: bytes that no edge tells apart
        self._samples = cuts[:-1]
        self._table = np.full((0, len(cuts) - 1), -1, dtype=np.int32)

    def complete(self, state: int) -> bool:
        return self._end in self._members[state]

    def step(self, state: int, byte: int) -> int:
        return int(self.next(np.array([state]), self.classes[[byte]])[0])

    def next(self, states: np.ndarray, classes: np.ndarray) -> np.ndarray:
        """State after one byte each."""
        self._grow()
        found = self._table[states, classes]
        missing = found < 0
        if missing.any():
            for state, kind in set(zip(states[missing].tolist(), classes[missing].tolist(), strict=True)):
                byte = self._samples[kind]
                places = {to for place in self._members[state] for low, high, to in self._edges[place] if low <= byte <= high}
                value = self._state(self._closed(places))
                self._grow()
                self._table[state, kind] = value
            found = self._table[states, classes]
        return found

    def _grow(self) -> None:
        short = len(self._members) - len(self._table)
        if short > 0:
            self._table = np.vstack([self._table, np.full((max(short, 256), self._table.shape[1]), -1, dtype=np.int32)])

    def _state(self, places: frozenset[int]) -> int:
        if places not in self._sets:
            self._sets[places] = len(self._members)
            self._members.append(places)
        return self._sets[places]

    def _closed(self, places: Iterable[int]) -> frozenset[int]:
        seen, todo = set(places), list(places)
        while todo:
            for to in self._silent[todo.pop()]:
                if to not in seen:
                    seen.add(to)
                    todo.append(to)
        # Places that only lead on in silence do not tell states apart.
        return frozenset(place for place in seen if self._edges[place] or place == self._end)

    def _place(self) -> int:
        self._edges.append([])
        self._silent.append([])
        return len(self._edges) - 1

    def _build(self, piece, end: int) -> int:
        """A place from which `piece` leads to `end`."""
        kind = piece[0]
        if kind == "bytes":
            start = self._place()
            self._edges[start].append((piece[1], piece[2], end))
            return start
        if kind == "seq":
            for part in reversed(piece[1:]):
                end = self._build(part, end)
            return end
        if kind == "alt":
            start = self._place()
            self._silent[start] = [self._build(part, end) for part in piece[1:]]
            return start
        _, low, high, inner = piece
        if high is None:
            loop = self._place()
            self._silent[loop] = [self._build(inner, loop), end]
            start = loop
        else:
            start = end
            for _ in range(high - low):
                start, after = self._place(), start
                self._silent[start] = [self._build(inner, after), end]
        for _ in range(low):
            start = self._build(inner, start)
        return start


class Vocabulary:
    """Every token of a model as bytes, to be walked through an automaton all at once."""

    def __init__(self, pieces: Sequence[bytes], stops: Iterable[int]) -> None:
        self.size = len(pieces)
        self._stops = sorted(stops)
        self._lengths = np.array([len(piece) for piece in pieces])
        self._order = np.argsort(-self._lengths, kind="stable")
        longest = int(self._lengths.max())
        self._bytes = np.zeros((longest, len(pieces)), dtype=np.uint8)
        for row, token in enumerate(self._order):
            piece = pieces[token]
            self._bytes[: len(piece), row] = np.frombuffer(piece, dtype=np.uint8)
        self._alive = [int((self._lengths > column).sum()) for column in range(longest)]

    def mask(self, automaton: Automaton, state: int) -> np.ndarray:
        """bool [vocab]: the tokens all of whose bytes lead somewhere; tokens that end a text where the automaton is complete."""
        classes = automaton.classes[self._bytes]
        states = np.full(self.size, state, dtype=np.int32)
        rows = np.arange(self._alive[0])
        for column, alive in enumerate(self._alive):
            rows = rows[: np.searchsorted(rows, alive)]
            after = automaton.next(states[rows], classes[column, rows])
            states[rows] = after
            rows = rows[after != automaton.dead]
        allowed = np.zeros(self.size, dtype=bool)
        allowed[self._order] = states != automaton.dead
        allowed[self._lengths == 0] = False
        allowed[self._stops] = automaton.complete(state)
        return allowed


def bits(words: np.ndarray, size: int) -> np.ndarray:
    """int32 words to bool [size]."""
    return np.unpackbits(words.view(np.uint8), bitorder="little")[:size].astype(bool)
