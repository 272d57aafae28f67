"""Leaving without dropping anybody: new work is refused while the answers in flight are finished."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from armillary.serve.http.errors import RETRY_AFTER_SECONDS, APIError
from armillary.serve.http.exchange import current
from armillary.serve.request import Event, Request


class Drain:
    """Whether a server is leaving, and what is to be finished before it does: answers, and (it is an observer) requests without one,
    which a response in the background has. Lines of batches are not waited for: one line would follow another."""

    def __init__(self) -> None:
        self.draining = False
        self.exchanges = 0
        self._requests: set[Request] = set()

    @property
    def in_flight(self) -> int:
        """0: nobody waits for anything."""
        return max(self.exchanges, len(self._requests))

    def submitted(self, request: Request) -> None:
        exchange = current()
        if exchange is None or not exchange.apart:
            self._requests.add(request)

    def event(self, request: Request, event: Event) -> None:
        if event.finish_reason is not None:
            self._requests.discard(request)

    def refusal(self) -> APIError:
        """What is said to whoever comes too late."""
        return APIError(
            503,
            f"the server is draining: it finishes {self.in_flight} requests and takes no new work; ask another one, or this one's successor",
            type="overloaded_error",
            code="draining",
            headers={"Retry-After": str(RETRY_AFTER_SECONDS), "connection": "close"},
        )


class DrainGuard:
    """Counts the exchanges that do work (POST) and, while draining, refuses more of them; what only looks (GET) is answered."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app = app
        self._drain = drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        if self._drain.draining:
            await self._drain.refusal().response(scope["path"])(scope, receive, send)
            return
        self._drain.exchanges += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.exchanges -= 1
