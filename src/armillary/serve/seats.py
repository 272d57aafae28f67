"""Where each request is: in the queue, waiting for the prompt that it shares, running, or ended and returned with its batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain

from armillary.serve.forks import Forks
from armillary.serve.request import Event, FinishReason, Request


class Seats:
    """`waiting` is in queue order, `running` in the order of admission; `parked` sequences wait until nothing else runs."""

    def __init__(self) -> None:
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.parked: list[tuple[Request, FinishReason, Event]] = []
        self.forks = Forks()

    @property
    def queued(self) -> int:
        """How many have not begun."""
        return len(self.waiting) + self.forks.count

    def queue(self) -> Iterator[Request]:
        return chain(self.waiting, self.forks)

    def enter(self, request: Request, *, as_fork: bool) -> None:
        """A new request, last in the queue, or with its parent's forks until `release_forks`."""
        if as_fork:
            self.forks.add(request)
        else:
            self.waiting.append(request)

    def admit(self, requests: Sequence[Request]) -> None:
        """From wherever they stand in the queue."""
        ids = {request.id for request in requests}
        while ids and self.waiting[0].id in ids:
            ids.remove(self.waiting.popleft().id)
        if ids:  # a policy that admits from the middle of the queue
            self.waiting = deque(request for request in self.waiting if request.id not in ids)
        self.running.extend(requests)

    def preempt(self, request: Request) -> None:
        """To the very front of the queue."""
        self.running.remove(request)
        self.waiting.appendleft(request)

    def park(self, request: Request, reason: FinishReason, event: Event) -> None:
        """A running sequence has ended, and is returned with its batch."""
        self.running.remove(request)
        self.parked.append((request, reason, event))

    def release_forks(self, parent: Request) -> None:
        """Those that waited for the parent's prompt take the place in the queue that they had before those who came later."""
        forks = self.forks.release(parent)
        if forks:
            place = next((i for i, request in enumerate(self.waiting) if request.number > forks[0].number), len(self.waiting))
            for fork in reversed(forks):
                self.waiting.insert(place, fork)

    def drop(self, request: Request) -> None:
        """Take a request out of wherever it is."""
        if request in self.running:
            self.running.remove(request)
        elif any(request is parked for parked, _, _ in self.parked):
            self.parked = [parked for parked in self.parked if parked[0] is not request]
        elif request in self.waiting:
            self.waiting.remove(request)
        else:
            self.forks.remove(request)

    def clear(self) -> None:
        self.waiting.clear()
        self.running.clear()
        self.parked.clear()
        self.forks.clear()
