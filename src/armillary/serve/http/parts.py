"""An answer as parts in the order in which it was written, text and calls: what Responses calls items, and Messages blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from armillary.serve.request import Event
from armillary.serve.tools.definitions import Call, Toolbox
from armillary.serve.tools.formats import CallFormat
from armillary.serve.tools.stream import Called, CallStream, Piece, Said


@dataclass(slots=True, eq=False)
class Part:
    """Text, or a call (`call` is not None). `pieces` add up to the text, or to the JSON text of the arguments."""

    index: int
    call: Call | None = None
    pieces: list[str] = field(default_factory=list)
    whole: bool = False

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@dataclass(frozen=True, slots=True)
class Begun:
    part: Part


@dataclass(frozen=True, slots=True)
class Grown:
    part: Part
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """`part.whole` is false for what the end of the answer cut off."""

    part: Part


Step = Begun | Grown | Ended


class Parts:
    """`add` takes the events of one choice in order; one part is open at a time, and the last event ends the last part.

    An answer that says nothing is one empty text.
    """

    def __init__(self, row: CallFormat, toolbox: Toolbox | None) -> None:
        self._reader = CallStream(row, toolbox, guaranteed=toolbox.choice == "required") if toolbox is not None else None
        self.all: list[Part] = []

    @property
    def called(self) -> bool:
        """Whether a call is among them."""
        return any(part.call is not None for part in self.all)

    def add(self, event: Event) -> list[Step]:
        steps: list[Step] = []
        for piece in self._pieces(event):
            if isinstance(piece, Called):
                self._begin(piece.call, steps)
                text = piece.call.arguments
            else:
                if isinstance(piece, Said) and (not self.all or self.all[-1].call is not None):
                    self._begin(None, steps)
                text = piece.text if isinstance(piece, Said) else piece.arguments
            if text:
                self.all[-1].pieces.append(text)
                steps.append(Grown(self.all[-1], text))
        if event.finish_reason is not None:
            if not self.all:
                self._begin(None, steps)
            last = self.all[-1]
            last.whole = event.finish_reason == "stop" if last.call is None else self._reader is None or not self._reader.unfinished
            steps.append(Ended(last))
        return steps

    def _pieces(self, event: Event) -> list[Piece]:
        if self._reader is None:
            return [Said(event.text)] if event.text else []
        pieces = self._reader.push(event.text) if event.text else []
        return pieces + self._reader.finish() if event.finish_reason is not None else pieces

    def _begin(self, call: Call | None, steps: list[Step]) -> None:
        if self.all:
            self.all[-1].whole = True
            steps.append(Ended(self.all[-1]))
        self.all.append(Part(len(self.all), call))
        steps.append(Begun(self.all[-1]))
