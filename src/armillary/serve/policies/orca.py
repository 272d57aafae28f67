"""Orca: iteration-level scheduling (Yu et al., OSDI 2022, algorithm 1)."""

from __future__ import annotations

from armillary.serve.policies.entries import drafts_that_fit, entry
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.policies.repetition import repeats
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Reason, Room, Schedule, State


class Orca:
    """Sequences join and leave the batch at every iteration, in the order of `queue` (the paper's: first come, first served), nobody overtakes.

    Admission reserves the KV blocks of the longest possible length, so nothing is ever preempted and no deadlock can
    arise; what is reserved and never used is the waste that PagedAttention removes. Prompts are not chunked. The paper
    has no token budget; here a prompt that does not fit the budget beside the others waits for them to end and then runs
    alone, even when it exceeds the budget by itself.
    """

    name = "orca"
    returns_together = False

    def __init__(self, queue: Queue | None = None) -> None:
        self._queue = queue if queue is not None else Queue()
        self.behind = self._queue.behind

    def step(self, state: State) -> Schedule:
        limits, room = state.limits, Room(state)
        entries: list[Entry] = []
        tokens = 0
        spare = limits.max_batch_tokens - len(state.running)  # for drafts: they leave a token to everyone
        for request in state.running:  # always fits: seats never exceed the budget, and a running sequence only decodes
            drafts = drafts_that_fit(request, spare, 0, limits.block_size)
            count = request.known - request.computed + drafts
            entries.append(entry(request, count, len(request.blocks)))
            tokens += count
            spare -= drafts

        seats = min(limits.max_running, limits.max_batch_tokens)
        admitted: list[Request] = []
        held: list[Hold] = []
        for request in self._queue.waiting(state, Reason.NO_SEAT if len(entries) >= seats else None):
            if len(entries) >= seats:
                held.append(Hold(request.id, Reason.NO_SEAT))
                break
            hit, blocks = state.memory.hit(request), limits.blocks_for(request.max_length)
            count, needed = request.known - hit.tokens, room.needed(blocks, hit)
            if needed > room.free:
                held.append(Hold(request.id, Reason.NO_BLOCKS))
                break
            if entries and tokens + count > limits.max_batch_tokens:
                held.append(Hold(request.id, Reason.NO_BUDGET))
                break
            entries.append(entry(request, count, blocks, hit))
            admitted.append(request)
            room.free -= needed
            tokens += count
        told = self._queue.told(state, admitted, held)
        return Schedule(state.index, tuple(entries), (), told, self._queue.overdue(state, admitted))

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return repeats(state, schedule, self._queue)
