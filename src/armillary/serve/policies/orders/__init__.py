"""In which order waiting sequences are considered: one order a file, chosen apart from the loop that admits and the victims' rule."""

from __future__ import annotations

from functools import partial

from armillary.core.errors import NotFoundError
from armillary.serve.policies.orders import deadline, prefix, priority, shortest
from armillary.serve.policies.orders.queue import Order, Queue
from armillary.serve.schedule import Reason

DEFAULT = "fcfs"
NAMES = (DEFAULT, "sjf", "deadline", "priority", "prefix")


def get(name: str, max_wait: int | None = None) -> Queue:
    """The queue in the order of that name, in which whoever has waited over `max_wait` ns comes first. Raises NotFoundError."""
    match name:
        case "fcfs":
            return Queue()
        case "sjf":
            order = Order(shortest.key, Reason.BEHIND_SHORTER)
        case "deadline":
            order = Order(deadline.key, Reason.BEHIND_DEADLINE)
        case "priority":
            order = Order(priority.key, Reason.BEHIND_PRIORITY)
        case "prefix":
            order = Order(partial(prefix.key, max_wait=max_wait), Reason.BEHIND_PREFIX, prefix.WINDOW)
        case _:
            raise NotFoundError(f"no order of the queue is called '{name}'", f"use one of: {', '.join(NAMES)}", field="order")
    return Queue(order, max_wait)
