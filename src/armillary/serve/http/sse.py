"""Answers over the wire: server-sent events or one JSON object; either way a client that goes away cancels its requests."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

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
        # What is the same in every chunk is written once.
        self._before = b"data: " + to_json(answer.head)[:-1] + b',"choices":['
        self._after = b'],"usage":null}\n\n' if answer.include_usage else b"]}\n\n"

    def begin(self) -> bytes:
        return b""

    def event(self, choice: int, event: Event) -> bytes:
        return b"".join([self._before + to_json(piece) + self._after for piece in self._answer.choices(choice, event)])

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
                async with Patience(send, WRITE_TIMEOUT_SECONDS) as patient:
                    await self._write(patient.send)
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _write(self, send: Send) -> None:
        wire = self._wire
        if begin := wire.begin():
            await send({"type": "http.response.body", "body": begin, "more_body": True})
        async for batch in self._stream.batches():
            frames: list[bytes] = []
            for choice, event in batch:
                error = failure(event)
                if error is not None:
                    await send({"type": "http.response.body", "body": b"".join([*frames, wire.failed(error)]), "more_body": True})
                    return
                frames.append(wire.event(choice, event))
            if payload := b"".join(frames):
                await send({"type": "http.response.body", "body": payload, "more_body": True})
        await send({"type": "http.response.body", "body": wire.end(), "more_body": True})


class Patience:
    """`send` within which no message may take longer than `seconds`: then the block ends with TimeoutError.

    One timer looks whether a message is overdue. `asyncio.timeout` around each would set and drop a timer for every token, which
    costs more than sending it.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self._send = send
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._since: float | None = None

    async def __aenter__(self) -> Patience:
        await self._limit.__aenter__()
        self._look()
        return self

    async def __aexit__(self, *exc: Any) -> None:
        self._timer.cancel()
        await self._limit.__aexit__(*exc)

    async def send(self, message: Message) -> None:
        self._since = self._loop.time()
        await self._send(message)
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        due = (now if self._since is None else self._since) + self._seconds
        if due <= now:
            self._limit.reschedule(now)
        else:
            self._timer = self._loop.call_at(due, self._look)


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
