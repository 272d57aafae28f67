"""Whether the same schedule comes again: what lets virtual time pass many iterations at once."""

from __future__ import annotations

from armillary.serve.policies.orders.queue import Queue
from armillary.serve.schedule import Reason, Schedule, State

_SEATS = frozenset({Reason.NO_SEAT, Reason.BATCH_CLOSED})  # nobody is asked whose turn it is
_MEMORY = frozenset({Reason.NO_BLOCKS})
_BUDGET = frozenset({Reason.NO_BUDGET})


def repeats(state: State, schedule: Schedule, queue: Queue, *, timed: bool = False) -> bool:
    """Whether a schedule of decodes of everything that runs, and of nothing else, comes again, each sequence a token further, until one
    arrives, ends or lacks a KV block.

    Whoever waits must still be held, and for the same reason: for a seat in any case; for blocks or budget where the queue has no order
    that could change its front, and the budget is not `timed` (found from what iterations take).
    """
    if not state.waiting:
        return True
    held = {hold.reason for hold in schedule.held}
    lasting = _SEATS | _MEMORY | _BUDGET if queue.in_order_of_arrival and not timed else _SEATS
    return bool(held) and held <= lasting
