"""Events on their way to the listeners of their requests: in order, and outside the engine's lock."""

from __future__ import annotations

import logging
import threading
from collections import deque

from armillary.serve.request import Event, Request

log = logging.getLogger(__name__)


class Outbox:
    """Filled under the engine's lock, which `changed` wraps; `deliver` hands out without it, so a listener may submit and cancel."""

    def __init__(self, changed: threading.Condition) -> None:
        self._changed = changed
        self._events: deque[tuple[Request, Event]] = deque()
        self._delivering = False
        self._broken: set[str] = set()  # requests whose listener has raised

    @property
    def empty(self) -> bool:
        """Whether everything has been handed out."""
        return not self._events and not self._delivering

    @property
    def waiting(self) -> bool:
        """Whether an event waits to be handed out."""
        return bool(self._events)

    def put(self, request: Request, event: Event) -> None:
        if request.on_event is not None:
            self._events.append((request, event))

    def deliver(self) -> None:
        """Hand out the events, in order; whoever is already doing so takes the new ones too."""
        with self._changed:
            if self._delivering:
                return
            self._delivering = True
        while True:
            if not self._events:
                with self._changed:
                    if not self._events:
                        self._delivering = False
                        self._changed.notify_all()
                        return
            request, event = self._events.popleft()  # without the lock: nobody else takes any
            try:
                assert request.on_event is not None
                request.on_event(event)
            except BaseException as error:
                if not isinstance(error, Exception):  # Ctrl-C: whoever delivers next goes on from here
                    self._delivering = False
                    raise
                if request.id not in self._broken:
                    log.exception("the listener of request '%s' raised; the request goes on", request.id)
                    self._broken.add(request.id)
            if event.finish_reason is not None:
                self._broken.discard(request.id)
