"""A connection that sends half a request head and then nothing, or a byte now and then, is closed."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol

HEAD_TIMEOUT_SECONDS = 30.0


def timed_protocol() -> type[asyncio.Protocol]:
    """uvicorn's HTTP protocol, whichever it would choose here, with a bound on how long a request's head may take.

    uvicorn itself times only how long a connection may idle after an answer. Bodies have a bound of their own (`body`).
    """

    class Timed(AutoHTTPProtocol):  # type: ignore[valid-type, misc]
        head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.await_head()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            self.await_head()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop_timer()
            super().connection_lost(exc)

        def await_head(self) -> None:
            """The timer runs from a head's beginning to its end, however its bytes trickle in."""
            if self.cycle is not None and not self.cycle.response_complete:
                self.stop_timer()
            elif self.head_timer is None:
                self.head_timer = self.loop.call_later(HEAD_TIMEOUT_SECONDS, self.transport.close)

        def stop_timer(self) -> None:
            if self.head_timer is not None:
                self.head_timer.cancel()
                self.head_timer = None

    return Timed
