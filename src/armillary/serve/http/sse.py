"""Answers over the wire: server-sent events or one JSON object; either way a client that goes away cancels its requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from armillary.serve.http.answers import Answer, WholeAnswer, failure
from armillary.serve.http.errors import APIError
from armillary.serve.request import Event
from armillary.serve.streams import AsyncStream

DONE = b"data: [DONE]\n\n"
WRITE_TIMEOUT_SECONDS = 60.0  # how long a client may leave an answer unread


def frame(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(data) + b"\n\n"


def named_frame(data: Mapping[str, Any]) -> bytes:
    """One server-sent event under the name of its `type`."""
    return b"event: " + str(data["type"]).encode() + b"\n" + frame(data)


class Wire(Protocol):
    """How an answer looks as a stream of server-sent events."""

    def begin(self) -> bytes:
        """What is sent before the first token is known."""
        ...

    def event(self, choice: int, event: Event) -> bytes:
        """What one event of one choice adds; b"" for nothing."""
        ...

    def end(self) -> bytes:
        """What follows the last event."""
        ...

    def failed(self, error: APIError) -> bytes:
        """The end of an answer that fails."""
        ...


class ChunkWire:
    """The stream of both completions: unnamed chunks, then `[DONE]`."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    def begin(self) -> bytes:
        return b""

    def event(self, choice: int, event: Event) -> bytes:
        return b"".join(frame(chunk) for chunk in self._answer.chunks(choice, event))

    def end(self) -> bytes:
        usage = self._answer.usage_chunk()
        return (frame(usage) if usage is not None else b"") + DONE

    def failed(self, error: APIError) -> bytes:
        return frame(error.body) + DONE


async def _cancel_when_gone(receive: Receive, stream: AsyncStream) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.cancel()


@contextlib.asynccontextmanager
async def cancelled_with_client(receive: Receive, stream: AsyncStream) -> AsyncIterator[None]:
    """While inside, a disconnect cancels the stream; leaving by an exception does too."""
    watcher = asyncio.create_task(_cancel_when_gone(receive, stream))
    try:
        yield
    finally:
        watcher.cancel()
        stream.cancel()


class EventStream(Response):
    """An answer as `text/event-stream`; `wire` says what its events look like.

    Everything that piled up since the last write goes out as one write. `send` waits while the client reads slowly;
    the engine does not: what it adds meanwhile is bounded by the requests' `max_tokens`, and a client that reads
    nothing for `WRITE_TIMEOUT_SECONDS` is let go.
    """

    media_type = "text/event-stream"

    def __init__(self, stream: AsyncStream, wire: Wire, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        del self.headers["content-length"]
        self._stream = stream
        self._wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with cancelled_with_client(receive, self._stream):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            with contextlib.suppress(OSError):  # the client is gone, or (TimeoutError is one) as good as gone
                async for payload in self._payloads():
                    async with asyncio.timeout(WRITE_TIMEOUT_SECONDS):
                        await send({"type": "http.response.body", "body": payload, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _payloads(self) -> AsyncIterator[bytes]:
        if begin := self._wire.begin():
            yield begin
        async for batch in self._stream.batches():
            frames: list[bytes] = []
            for choice, event in batch:
                error = failure(event)
                if error is not None:
                    yield b"".join([*frames, self._wire.failed(error)])
                    return
                frames.append(self._wire.event(choice, event))
            if any(frames):
                yield b"".join(frames)
        yield self._wire.end()


async def whole(request: Request, stream: AsyncStream, answer: WholeAnswer, headers: Mapping[str, str] | None = None) -> Response:
    """The complete answer as one JSON object. Raises `APIError` when a choice failed."""
    async with cancelled_with_client(request.receive, stream):
        async for batch in stream.batches():
            for choice, event in batch:
                error = failure(event)
                if error is not None:
                    raise error
                answer.add(choice, event)
    return Response(to_json(answer.result()), media_type="application/json", headers=dict(headers or {}))
