"""Leaving without dropping anybody: new work is refused while the answers in flight are finished."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from armillary.serve.http.errors import RETRY_AFTER_SECONDS, APIError


class Drain:
    """Whether a server is leaving, and how many exchanges are to be finished before it does."""

    def __init__(self) -> None:
        self.draining = False
        self.in_flight = 0

    def refusal(self) -> APIError:
        """What is said to whoever comes too late."""
        return APIError(
            503,
            f"the server is draining: it finishes {self.in_flight} answers and takes no new work; ask another one, or this one's successor",
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
        self._drain.in_flight += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.in_flight -= 1
