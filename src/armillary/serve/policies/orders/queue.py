"""The waiting sequences in an order, with a bound on how long anyone waits."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from armillary.serve.request import Request
from armillary.serve.schedule import Hold, Reason, State

Key = Callable[[Request], Any]


@dataclass(frozen=True, slots=True)
class Order:
    """`key(state)` gives each request's place: the lowest goes first, equals go as they stand in the queue.

    `behind` tells those who are overtaken by whom. `window` bounds how many from the queue's front are compared, where a key
    costs time in the length of a prompt; the others follow as they came.
    """

    key: Callable[[State], Key]
    behind: Reason
    window: int | None = None


class Queue:
    """An order (none: first come, first served), and the starvation bound.

    Who has waited over `max_wait` ns since its arrival goes first, whatever the order, and such ones as they came. A sequence that
    was preempted counts as waiting since it arrived.
    """

    def __init__(self, order: Order | None = None, max_wait: int | None = None) -> None:
        self._order = order
        self._max_wait = max_wait
        self.behind = order.behind if order is not None else Reason.QUEUE_ORDER

    @property
    def in_order_of_arrival(self) -> bool:
        """Whether nobody overtakes: who is next changes only when somebody comes or goes."""
        return self._order is None

    def waiting(self, state: State, closed: Reason | None = None) -> Iterable[Request]:
        """Each in its turn; as they stand in the queue where it is `closed` to all, for putting it in order costs time in its length."""
        return state.waiting if self._order is None or closed is not None else self._ranked(self._order, state)

    def told(self, state: State, admitted: Sequence[Request], held: Sequence[Hold]) -> tuple[Hold, ...]:
        """`held`, and that others went before the front of the queue, if they did."""
        front = state.waiting[0] if self._order is not None and state.waiting else None
        if front is None or front in admitted or (not admitted and any(hold.request_id == front.id for hold in held)):
            return tuple(held)
        return (*(hold for hold in held if hold.request_id != front.id), Hold(front.id, self.behind))

    def overdue(self, state: State, admitted: Sequence[Request]) -> tuple[str, ...]:
        """Those of the admitted whom the bound let go first, and not the order."""
        return tuple(request.id for request in admitted if self._waited_long(request, state)) if self._order is not None else ()

    def _waited_long(self, request: Request, state: State) -> bool:
        return self._max_wait is not None and request.arrival is not None and state.now - request.arrival > self._max_wait

    def _ranked(self, order: Order, state: State) -> Iterator[Request]:
        key = order.key(state)
        heap = [
            (0, (), place, request) if self._waited_long(request, state) else (1, key(request), place, request)
            for place, request in enumerate(islice(state.waiting, order.window))
        ]
        heapq.heapify(heap)
        while heap:
            yield heapq.heappop(heap)[3]
        if order.window is not None:
            yield from islice(state.waiting, order.window, None)
