"""An answer's text taken apart while it comes: what is said, and what is called.

Where the model may write what it likes, a call is held back until it is whole and valid; if it never is, it is text, and nothing is
lost. Where a grammar guarantees calls, the name goes out as soon as it is known and the arguments piece by piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from armillary.serve.tools.constraint import call_begin
from armillary.serve.tools.definitions import Call, Toolbox
from armillary.serve.tools.formats import CallFormat
from armillary.serve.tools.reading import read_calls


@dataclass(frozen=True, slots=True)
class Said:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """Call number `index` begins, with the first piece of its arguments (all of them, when it was held back)."""

    index: int
    call: Call


@dataclass(frozen=True, slots=True)
class More:
    """The next piece of the arguments of call number `index`."""

    index: int
    arguments: str


Piece = Said | Called | More


class CallStream:
    """Takes an answer's text as it comes. `guaranteed`: a grammar makes the answer nothing but calls, each begun as `call_begin` says."""

    def __init__(self, row: CallFormat, toolbox: Toolbox, *, guaranteed: bool) -> None:
        self._row = row
        self._idle = " \t\r\n" + row.separator  # what may stand between calls and means nothing
        self._names = [tool.name for tool in toolbox.callable]
        self._guaranteed = guaranteed and row.syntax == "json"
        self._buffer = ""
        self._searched = 0  # of the buffer: no call ends before it
        self._in_call = False
        self._said_any = False
        self._value = _Value()
        self.calls = 0

    @property
    def unfinished(self) -> bool:
        """Whether the latest call lacks its end: one whose arguments are told as they are written."""
        return self._guaranteed and self._in_call

    def push(self, text: str) -> list[Piece]:
        """The next text; gives what is certain now."""
        self._buffer += text
        return list(self._guaranteed_pieces() if self._guaranteed else self._free_pieces())

    def finish(self) -> list[Piece]:
        """No text follows: what was held back and is no call is text."""
        pieces = [] if self._guaranteed else list(self._free_pieces())
        rest, self._buffer = self._buffer, ""
        if rest and not self._guaranteed and (self._in_call or rest.strip(self._idle) or not self.calls):
            pieces.append(Said(rest))
        return pieces

    # Calls among text

    def _free_pieces(self) -> Iterator[Piece]:
        while self._buffer:
            if not self._in_call:
                start = self._call_starts()
                if start is None:
                    return
                before, self._buffer = self._buffer[:start], self._buffer[start:]
                if before and (before.strip(self._idle) or not self.calls):
                    self._said_any = True
                    yield Said(before)
                if not self._buffer or not self._begins():
                    return
                self._in_call, self._searched = True, 0
            found = self._whole_call()
            if found is None:
                return
            calls, length = found
            self._buffer, self._in_call = self._buffer[length:], False
            for call in calls:
                yield Called(self.calls, call)
                self.calls += 1

    def _begins(self) -> bool:
        mark = self._row.start.strip()
        return self._buffer.startswith(mark) if mark else True

    def _call_starts(self) -> int | None:
        """Where in the buffer a call begins or may begin; its length when none does; None to wait."""
        mark = self._row.start.strip()
        if mark:
            found = self._buffer.find(mark)
            if found >= 0:
                return found
            for length in range(min(len(mark) - 1, len(self._buffer)), 0, -1):
                if mark.startswith(self._buffer[-length:]):
                    return len(self._buffer) - length
            # Space before a call that may come is not said either.
            return len(self._buffer.rstrip()) or len(self._buffer)
        bare = self._buffer.lstrip(self._idle)
        if self._said_any or (bare and bare[0] not in "{["):
            return len(self._buffer)
        return len(self._buffer) - len(bare) if bare else None

    def _whole_call(self) -> tuple[list[Call], int] | None:
        """The calls at the buffer's beginning and their length there, once an end is reached at which they are valid."""
        row = self._row
        start = len(row.start.strip())
        end = row.end.strip()
        ends = end or ("]" if row.together else "}")
        while True:
            position = self._buffer.find(ends, max(start, self._searched))
            if position < 0:
                self._searched = max(start, len(self._buffer) - len(ends) + 1)
                return None
            self._searched = position + 1
            inside = self._buffer[start : position if end else position + 1]
            calls = read_calls(inside, row, self._names)
            if calls is not None:
                return calls, position + len(ends)

    # Calls and nothing else

    def _guaranteed_pieces(self) -> Iterator[Piece]:
        while self._buffer:
            if not self._in_call:
                named = self._named()
                if named is None:
                    return
                name, length = named
                self._buffer, self._in_call, self._value = self._buffer[length:], True, _Value()
                yield Called(self.calls, Call(name, ""))
                self.calls += 1
            taken = self._value.take(self._buffer)
            piece, self._buffer = self._buffer[:taken], self._buffer[taken:]
            if piece:
                yield More(self.calls - 1, piece)
            if not self._value.ended:
                return
            self._in_call = False

    def _named(self) -> tuple[str, int] | None:
        """The tool whose call's beginning is in the buffer, and where its arguments start."""
        begins = {name: call_begin(self._row, name) for name in self._names}
        found = [(position, name) for name, begin in begins.items() if (position := self._buffer.find(begin)) >= 0]
        if not found:
            return None
        position, name = min(found)
        return name, position + len(begins[name])


class _Value:
    """Finds the end of a JSON object whose text comes in pieces."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._quoted = False
        self._escaped = False

    def take(self, text: str) -> int:
        """How many characters of `text` belong to the value."""
        for index, character in enumerate(text):
            if self._quoted:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._quoted = False
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self.ended = True
                    return index + 1
        return len(text)


def read_answer(text: str, row: CallFormat, toolbox: Toolbox) -> tuple[str, Sequence[Call]]:
    """A whole answer: what is said, and the calls."""
    stream = CallStream(row, toolbox, guaranteed=False)
    pieces = [*stream.push(text), *stream.finish()]
    return "".join(piece.text for piece in pieces if isinstance(piece, Said)), [piece.call for piece in pieces if isinstance(piece, Called)]
