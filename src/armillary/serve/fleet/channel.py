"""Messages over a socket: a length, then JSON. Both are bounded, so that a confused peer costs a connection and not the memory."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from typing import Final

from armillary.core.errors import FormatError
from armillary.serve.fleet.messages import Message

MAX_MESSAGE: Final = 64 << 20  # bytes: a prompt of a million tokens with its scores
READ: Final = 1 << 18
_LENGTH: Final = struct.Struct("<I")


class Channel:
    """One end. `send` may be called from any thread; on a socket that does not block, what the peer has not taken yet waits in memory.

    The owner bounds that memory: it sends a replica at most the requests that it lets wait.
    """

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._incoming = bytearray()
        self._outgoing: deque[memoryview] = deque()
        self._lock = threading.Lock()

    @property
    def pending(self) -> bool:
        """Whether something waits to be taken by the peer."""
        return bool(self._outgoing)

    def send(self, message: Message) -> None:
        """Raises OSError when the peer is gone, FormatError when `message` is over the bound."""
        body = json.dumps(message, separators=(",", ":")).encode()
        if len(body) > MAX_MESSAGE:
            raise FormatError(f"a message of {len(body):,} bytes between processes; the bound is {MAX_MESSAGE:,}", "send a shorter prompt")
        with self._lock:
            self._outgoing.append(memoryview(_LENGTH.pack(len(body)) + body))
            self._flush()

    def flush(self) -> None:
        """Send what waits, as far as the peer takes it."""
        with self._lock:
            self._flush()

    def _flush(self) -> None:
        while self._outgoing:
            first = self._outgoing[0]
            try:
                sent = self.socket.send(first)
            except (BlockingIOError, InterruptedError):
                return
            if sent < len(first):
                self._outgoing[0] = first[sent:]
            else:
                self._outgoing.popleft()

    def receive(self) -> list[Message]:
        """All whole messages that have come: waits for one on a blocking socket, and may be empty on the other kind.

        Raises EOFError at the peer's end, OSError, and FormatError for what is no message.
        """
        while True:
            try:
                data = self.socket.recv(READ)
            except (BlockingIOError, InterruptedError):
                return []
            if not data:
                raise EOFError("the other process closed the connection")
            self._incoming += data
            messages = self._split()
            if messages or self.socket.gettimeout() == 0.0:
                return messages

    def _split(self) -> list[Message]:
        messages: list[Message] = []
        start, incoming = 0, self._incoming
        while len(incoming) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(incoming, start)
            if length > MAX_MESSAGE:
                raise FormatError(
                    f"a message of {length:,} bytes is announced; the bound is {MAX_MESSAGE:,}", "the other end is no replica"
                )
            end = start + _LENGTH.size + length
            if len(incoming) < end:
                break
            try:
                message = json.loads(incoming[start + _LENGTH.size : end])
            except ValueError as error:
                raise FormatError(f"a message between processes is no JSON: {error}", "the other end is no replica") from error
            if not isinstance(message, dict):
                raise FormatError("a message between processes is no object", "the other end is no replica")
            messages.append(message)
            start = end
        del incoming[:start]
        return messages

    def close(self) -> None:
        self.socket.close()
