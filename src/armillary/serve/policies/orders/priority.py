"""Priority classes, as vLLM has them: the lower number goes first."""

from __future__ import annotations

from armillary.serve.policies.orders.queue import Key
from armillary.serve.request import Request
from armillary.serve.schedule import State


def key(state: State) -> Key:
    """By `Request.priority`; within a class as they stand in the queue: preempted sequences, then first come, first served.

    Nobody who runs makes way for one that waits. When blocks run out, the victims are of the lowest class (`policies.victims`).
    """

    def class_of(request: Request) -> int:
        return request.priority

    return class_of
