"""Earliest deadline first: the order that meets all deadlines if any order does (Liu and Layland 1973), kept from collapsing in overload."""

from __future__ import annotations

from armillary.serve.policies.orders.queue import Key
from armillary.serve.request import Request
from armillary.serve.schedule import State

IN_TIME, LATE, WITHOUT = range(3)


def key(state: State) -> Key:
    """By when the first token is due (`Request.deadline`); sequences without a deadline go last.

    In overload plain EDF misses every deadline, for it serves first who is late already. So whoever can no longer be in
    time, even at once and at the speed of the largest iteration of late, goes behind those who can. A preempted sequence has
    begun to answer, and goes before those that have not.
    """
    tokens, duration = max(state.measured, default=(1, 0))

    def due(request: Request) -> tuple[bool, int, int]:
        if request.deadline is None:
            return request.preemptions == 0, WITHOUT, 0
        earliest = state.now + (request.known - request.computed) * duration // tokens
        return request.preemptions == 0, IN_TIME if earliest <= request.deadline else LATE, request.deadline

    return due
