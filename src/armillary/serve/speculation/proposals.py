"""Drafts for the sequences of an engine: asked for without its lock, while any of them may end."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request
from armillary.serve.speculation.drafter import Drafter

log = logging.getLogger(__name__)


class Proposals:
    """`lock` is the engine's."""

    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock
        self._asking = False  # without the lock; whoever ends meanwhile is kept for the drafter to forget
        self._ended_meanwhile: list[Request] = []

    def ask(self, drafter: Drafter, running: Sequence[Request]) -> None:
        """Have tokens proposed for every running sequence that decodes and has more than one to come. Takes the lock."""
        with self._lock:
            wanting = [request for request in running if is_decode(request) and request.max_length - request.known > 1]
            most = [request.max_length - request.known - 1 for request in wanting]
            self._asking = bool(wanting)
        if not wanting:
            return
        proposed: Sequence[tuple[int, ...]] = [()] * len(wanting)
        try:
            proposed = drafter.propose(wanting, most)
        except Exception:  # nobody's answer depends on it
            log.exception("the drafter failed; the iteration goes on without drafts")
        finally:
            with self._lock:
                for request, tokens, bound in zip(wanting, proposed, most, strict=True):
                    if request.finish_reason is None:
                        request.drafts = tuple(tokens[:bound])
                        request.draft_laws = drafter.laws(request) if request.drafts else ()
                self._asking = False
                for request in self._ended_meanwhile:
                    drafter.forget(request)
                self._ended_meanwhile.clear()

    def forget(self, drafter: Drafter, request: Request) -> None:
        """The request has ended. Called with the lock held."""
        if self._asking:
            self._ended_meanwhile.append(request)
        else:
            drafter.forget(request)
