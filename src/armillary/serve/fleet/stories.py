"""What the router did with each request, in words."""

from __future__ import annotations

from collections import OrderedDict

from armillary.core.units import format_duration

WORDS = 64  # of a request; beyond that the middle is cut
ENDED = 256  # stories kept after the end


class Stories:
    """Told as things happen; read while a request lives and for some time after."""

    def __init__(self) -> None:
        self._arrival: dict[str, int] = {}
        self._words: OrderedDict[str, list[str]] = OrderedDict()
        self._ended: OrderedDict[str, None] = OrderedDict()

    def begin(self, request_id: str, at: int) -> None:
        self._ended.pop(request_id, None)
        self._arrival[request_id] = at
        self._words[request_id] = []

    def tell(self, request_id: str, at: int, words: str) -> None:
        story = self._words[request_id]
        if len(story) == WORDS:
            del story[WORDS // 2]
        story.append(f"+{format_duration(at - self._arrival[request_id])}: {words}")

    def end(self, request_id: str) -> None:
        self._ended[request_id] = None
        while len(self._ended) > ENDED:
            gone, _ = self._ended.popitem(last=False)
            del self._words[gone], self._arrival[gone]

    def read(self, request_id: str) -> list[str] | None:
        story = self._words.get(request_id)
        return None if story is None else list(story)
