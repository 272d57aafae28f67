"""Responses that can be asked for again and continued: the latest ones, in memory, within two bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pydantic_core import to_json

from armillary.core.errors import NotFoundError

Json = dict[str, Any]

MAX_RESPONSES = 1024
MAX_BYTES = 64 * 1024 * 1024


@dataclass(slots=True, eq=False)
class StoredResponse:
    """A response and the conversation that led to it, its own output last once it has ended."""

    response: Json
    input: list[Json]  # this request's items
    conversation: tuple[Json, ...]  # all earlier items and these
    cancel: Callable[[], object]
    owner: str = ""  # the name of the key that it was made with: to any other it is not there
    bytes: int = field(default=0)


class ResponseStore:
    """The least recently used leave first. Not for threads: it lives on the server's event loop."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[str, StoredResponse] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def keep(self, stored: StoredResponse) -> None:
        """Keep a response, or weigh it again after it has grown."""
        name = stored.response["id"]
        self._bytes -= stored.bytes if name in self._kept else 0
        stored.bytes = len(to_json(stored.conversation)) + len(to_json(stored.response))
        self._bytes += stored.bytes
        self._kept[name] = stored
        self._kept.move_to_end(name)
        while self._bytes > self._max_bytes or len(self._kept) > self._max_responses:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= oldest.bytes

    def get(self, name: str, owner: str = "", field: str = "response_id") -> StoredResponse:
        """Raises NotFoundError for one that never was, was not stored, was deleted or has made room for others."""
        stored = self._kept.get(name)
        if stored is None or stored.owner != owner:
            raise NotFoundError(
                f"there is no response {name[:128]!r}",
                f"send the whole conversation as input: the server keeps its latest {self._max_responses:,} responses, "
                f"at most {self._max_bytes >> 20} MiB, and none with store: false",
                field=field,
            )
        self._kept.move_to_end(name)
        return stored

    def delete(self, name: str, owner: str = "") -> StoredResponse:
        stored = self.get(name, owner)
        del self._kept[name]
        self._bytes -= stored.bytes
        return stored

    def holds(self, stored: StoredResponse) -> bool:
        return self._kept.get(stored.response["id"]) is stored
