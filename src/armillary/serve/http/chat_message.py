"""The message of one choice while it is written: its text, and the calls of tools among it."""

from __future__ import annotations

from typing import Any

from armillary.serve.request import Event
from armillary.serve.tools.definitions import Toolbox
from armillary.serve.tools.formats import CallFormat
from armillary.serve.tools.stream import Called, CallStream, More, Piece, Said

Json = dict[str, Any]


class ChatMessage:
    """`add` takes the events in order and gives what each adds, as the `delta` of a chunk; `whole` is all of it."""

    def __init__(self, row: CallFormat, toolbox: Toolbox | None) -> None:
        self._reader = CallStream(row, toolbox, guaranteed=toolbox.choice == "required") if toolbox is not None else None
        self._texts: list[str] = []
        self._calls: list[Json] = []
        self.finish_reason: str | None = None

    def add(self, event: Event) -> list[Json]:
        if event.finish_reason is not None:
            self.finish_reason = event.finish_reason
        pieces: list[Piece] = [Said(event.text)] if event.text else []
        if self._reader is not None:
            pieces = self._reader.push(event.text) if event.text else []
            if event.finish_reason is not None:
                pieces += self._reader.finish()
                if event.finish_reason == "stop" and self._reader.calls:
                    self.finish_reason = "tool_calls"
        return [self._delta(piece) for piece in pieces]

    def whole(self) -> Json:
        text = "".join(self._texts)
        if not self._calls:
            return {"role": "assistant", "content": text, "refusal": None}
        return {"role": "assistant", "content": text or None, "refusal": None, "tool_calls": self._calls}

    def _delta(self, piece: Piece) -> Json:
        if isinstance(piece, Said):
            self._texts.append(piece.text)
            return {"content": piece.text}
        if isinstance(piece, Called):
            function = {"name": piece.call.name, "arguments": piece.call.arguments}
            self._calls.append({"id": piece.call.id, "type": "function", "function": dict(function)})
            return {"tool_calls": [{"index": piece.index, "id": piece.call.id, "type": "function", "function": function}]}
        assert isinstance(piece, More)
        self._calls[piece.index]["function"]["arguments"] += piece.arguments
        return {"tool_calls": [{"index": piece.index, "function": {"arguments": piece.arguments}}]}
