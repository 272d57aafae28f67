"""Orca: iteration-level scheduling (Yu et al., OSDI 2022, algorithm 1)."""

from __future__ import annotations

from armillary.serve.policies.entries import drafts_that_fit, entry
from armillary.serve.schedule import Entry, Hold, Reason, Room, Schedule, State


class Orca:
    """Sequences join and leave the batch at every iteration, first come, first served, nobody overtakes.

    Admission reserves the KV blocks of the longest possible length, so nothing is ever preempted and no deadlock can
    arise; what is reserved and never used is the waste that PagedAttention removes. Prompts are not chunked. The paper
    has no token budget; here a prompt that does not fit the budget beside the others waits for them to end and then runs
    alone, even when it exceeds the budget by itself.
    """

    name = "orca"
    returns_together = False

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
        for request in state.waiting:
            if len(entries) >= seats:
                return Schedule(state.index, tuple(entries), (), (Hold(request.id, Reason.NO_SEAT),))
            hit, blocks = state.memory.hit(request), limits.blocks_for(request.max_length)
            count, needed = request.known - hit.tokens, room.needed(blocks, hit)
            if needed > room.free:
                return Schedule(state.index, tuple(entries), (), (Hold(request.id, Reason.NO_BLOCKS),))
            if entries and tokens + count > limits.max_batch_tokens:
                return Schedule(state.index, tuple(entries), (), (Hold(request.id, Reason.NO_BUDGET),))
            entries.append(entry(request, count, blocks, hit))
            room.free -= needed
            tokens += count
        return Schedule(state.index, tuple(entries))
