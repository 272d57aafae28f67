"""Request-level batching: the baseline that Orca and its successors are measured against."""

from __future__ import annotations

from armillary.serve.policies.entries import drafts_that_fit, entry
from armillary.serve.policies.orca import Orca
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.schedule import Entry, Hold, Reason, Schedule, State


class RequestLevel:
    """A batch is admitted together and runs to its end before another starts, as FasterTransformer serves.

    Who is admitted follows Orca's rules (whole prompts, memory reserved for the longest possible length, in the order of `queue`),
    but only while nothing runs. A sequence that ends early keeps its blocks, and its answer is returned with
    the rest of the batch (`returns_together`).
    """

    name = "request-level"
    returns_together = True

    def __init__(self, queue: Queue | None = None) -> None:
        self._admission = Orca(queue)
        self.behind = self._admission.behind

    def step(self, state: State) -> Schedule:
        if not state.running:
            return self._admission.step(state)
        entries: list[Entry] = []
        spare = state.limits.max_batch_tokens - len(state.running)
        for request in state.running:
            drafts = drafts_that_fit(request, spare, 0, state.limits.block_size)
            entries.append(entry(request, request.known - request.computed + drafts, len(request.blocks)))
            spare -= drafts
        held = (Hold(state.waiting[0].id, Reason.BATCH_CLOSED),) if state.waiting else ()
        return Schedule(state.index, tuple(entries), (), held)

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return self._admission.repeats(state, schedule)
