"""One HTTP request with its answer, from its first byte to its last: what the log, the limits and the spans are about."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from armillary.serve.request import Request

REQUEST_ID = "x-request-id"


@dataclass(slots=True, eq=False)
class Exchange:
    """Instants are ns of `time.perf_counter_ns`. `requests` are those that it has put to the engine."""

    id: str
    method: str
    path: str
    headers: Headers
    start: int
    key: str | None = None  # the name of the key that it came with
    status: int | None = None  # None: the client went before there was one
    first_byte: int | None = None
    end: int | None = None
    complete: bool = False  # the answer was sent to its end
    left: bool = False  # the client went before that
    requests: list[Request] = field(default_factory=list)
    apart: bool = False  # no client waits for it


_current: ContextVar[Exchange | None] = ContextVar("exchange", default=None)


def current() -> Exchange | None:
    """The exchange that this code runs for."""
    return _current.get()


def owner() -> str:
    """The name of the key that this code runs for, "" where there are none: whose data it may see."""
    exchange = _current.get()
    return (exchange.key or "") if exchange is not None else ""


def begin_apart(path: str) -> None:
    """From here on this task runs for an exchange of its own, that nobody waits for, with the key of the one that it came from."""
    parent = _current.get()
    key = parent.key if parent is not None else None
    _current.set(Exchange(f"req-{secrets.token_hex(12)}", "POST", path, Headers(), time.perf_counter_ns(), key, apart=True))


class Exchanges:
    """The outermost layer: begins an exchange, gives its answer an `x-request-id`, and tells `listeners` when it is over."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Callable[[Exchange], None]] = ()) -> None:
        self._app = app
        self._listeners = tuple(listeners)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = Exchange(f"req-{secrets.token_hex(12)}", scope["method"], scope["path"], Headers(scope=scope), time.perf_counter_ns())

        async def listened() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not exchange.complete:
                exchange.left = True
            return message

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                exchange.id = headers.setdefault(REQUEST_ID, exchange.id)
                exchange.status, exchange.first_byte = message["status"], time.perf_counter_ns()
            await send(message)
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                exchange.complete = True

        token = _current.set(exchange)
        try:
            await self._app(scope, listened, watched)
        except Exception:
            exchange.status = exchange.status or 500  # which the server's own handler, outside of this layer, is about to answer
            raise
        finally:
            _current.reset(token)
            exchange.end = time.perf_counter_ns()
            for listener in self._listeners:
                listener(exchange)


class Linked:
    """An observer that notes with an exchange what it has put to the engine."""

    def submitted(self, request: Request) -> None:
        exchange = current()
        if exchange is not None:
            exchange.requests.append(request)

    def event(self, request: Request, event: object) -> None: ...
