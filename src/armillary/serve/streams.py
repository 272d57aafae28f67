"""How a request's events leave the engine's thread: into an asyncio loop, or into a plain blocking iterator."""

from __future__ import annotations

import asyncio
import contextlib
import queue
from collections import deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from typing import Protocol

from armillary.serve.request import Event, Request


class Observer(Protocol):
    """Is told what happens to requests; metrics are one. Called on the consumer's side, never on the engine's thread."""

    def submitted(self, request: Request) -> None: ...

    def event(self, request: Request, event: Event) -> None: ...


class Observers:
    """Several observers as one, told in order."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = tuple(observers)

    def submitted(self, request: Request) -> None:
        for observer in self._observers:
            observer.submitted(request)

    def event(self, request: Request, event: Event) -> None:
        for observer in self._observers:
            observer.event(request, event)


class LoopBridge:
    """Carries events from the engine's thread to one asyncio loop, with one wakeup for all that piled up.

    The engine never waits here: `post` appends and, when the loop has not yet been told, wakes it. What a slow
    reader leaves behind is bounded by its requests' `max_tokens`.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._mail: deque[tuple[AsyncStream, int, Event]] = deque()
        self._woken = False

    def post(self, stream: AsyncStream, choice: int, event: Event) -> None:
        """Any thread. The append comes before the look at the flag, and `_deliver` clears the flag before it reads: nothing is left lying."""
        self._mail.append((stream, choice, event))
        if not self._woken:
            self._woken = True
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to read
                self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._woken = False
        mail = self._mail
        while mail:
            stream, choice, event = mail.popleft()
            stream.receive(choice, event)


class AsyncStream:
    """The events of a group of requests (the choices of one answer), as an async iterator of batches.

    Leaving the iteration early, or `cancel()`, cancels in the engine whatever has not finished.
    """

    def __init__(self, cancel: Callable[[str], object], observer: Observer | None = None) -> None:
        self.requests: tuple[Request, ...] = ()
        self._cancel = cancel
        self._observer = observer
        self._ready: list[tuple[int, Event]] = []
        self._open: set[int] = set()
        self._waiter: asyncio.Future[None] | None = None
        self._cancelled = False

    def begin(self, requests: Sequence[Request]) -> None:
        self.requests = tuple(requests)
        self._open = set(range(len(self.requests)))

    def receive(self, choice: int, event: Event) -> None:
        """On the loop: one event of one choice."""
        if choice not in self._open:
            return
        if self._observer is not None:
            self._observer.event(self.requests[choice], event)
        if event.finish_reason is not None:
            self._open.discard(choice)
        self._ready.append((choice, event))
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel(self) -> None:
        """Ask the engine to drop what has not finished. Safe to call twice, and after the end."""
        if not self._cancelled:
            self._cancelled = True
            for choice in sorted(self._open):
                self._cancel(self.requests[choice].id)

    async def batches(self) -> AsyncGenerator[list[tuple[int, Event]]]:
        """Yield `(choice, event)` in lists: all that has arrived since the last one. Ends when every choice has finished."""
        try:
            while self._ready or self._open:
                if not self._ready:
                    self._waiter = asyncio.get_running_loop().create_future()
                    try:
                        await self._waiter
                    finally:
                        self._waiter = None
                batch, self._ready = self._ready, []
                yield batch
        finally:
            self.cancel()


class BlockingStream:
    """The events of one request as a plain iterator, for programs without an event loop."""

    def __init__(self, cancel: Callable[[str], object]) -> None:
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()

    def put(self, event: Event) -> None:
        self._events.put(event)

    def events(self, request: Request) -> Generator[Event]:
        """Yield until the request finishes; closing the iterator early cancels it in the engine."""
        finished = False
        try:
            while not finished:
                event = self._events.get()
                finished = event.finish_reason is not None
                yield event
        finally:
            if not finished:
                self._cancel(request.id)
