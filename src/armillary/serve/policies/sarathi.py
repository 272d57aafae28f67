"""Sarathi-Serve: decodes never wait for a prompt (Agrawal et al., OSDI 2024, algorithm 3)."""

from __future__ import annotations

from armillary.serve.policies.entries import drafts_that_fit, entry, is_decode, preemption, turned_away
from armillary.serve.schedule import Entry, Hold, Preemption, Reason, Room, Schedule, State


class Sarathi:
    """Stall-free batches: each iteration is all running decodes, then prompt chunks with what the token budget leaves.

    1. Every running decode gets its one token, and its drafts as far as they fit. When the blocks run out the last admitted is
       preempted (recompute).
    2. Prompts that have begun continue, cut to the budget.
    3. If nobody was preempted, new sequences are admitted in queue order. Admission takes the blocks of the whole prompt
       at once, so that a prompt that has begun never waits for memory and prompts cannot preempt each other.

    The budget bounds every iteration's length, and so the time between two tokens of a running sequence.
    """

    name = "sarathi"
    returns_together = False

    def step(self, state: State) -> Schedule:
        limits = state.limits
        running = list(state.running)
        room, budget = Room(state), limits.max_batch_tokens
        entries: list[Entry] = []
        preempted: list[Preemption] = []
        held: list[Hold] = []

        spare = budget - len(running)  # for drafts: they leave a token to everyone
        position = 0
        while position < len(running):
            request = running[position]
            if is_decode(request):
                blocks = max(len(request.blocks), limits.blocks_for(request.known))
                while blocks - len(request.blocks) > room.free and position < len(running):
                    victim = running.pop()  # those after `position` have no entry yet
                    preempted.append(preemption(victim, room))
                if position == len(running):
                    break
                drafts = drafts_that_fit(request, spare, room.free, limits.block_size)
                blocks = max(blocks, limits.blocks_for(request.known + drafts))
                entries.append(entry(request, 1 + drafts, blocks))
                room.free -= blocks - len(request.blocks)
                budget -= 1 + drafts
                spare -= drafts
            position += 1

        for request in running:
            if is_decode(request):
                continue
            count = min(request.known - request.computed, budget)
            if count <= 0:
                held.append(Hold(request.id, Reason.NO_BUDGET))
                continue
            entries.append(entry(request, count, len(request.blocks)))
            budget -= count

        seats = min(limits.max_running, limits.max_batch_tokens) - len(running)
        for request in state.waiting:
            stop = turned_away(preempted, seats, budget)
            if stop is None:
                hit, blocks = state.memory.hit(request), limits.blocks_for(request.known)
                needed = room.needed(blocks, hit)
                if needed > room.free:
                    stop = Reason.NO_BLOCKS
            if stop is not None:
                held.append(Hold(request.id, stop))
                break
            count = min(request.known - hit.tokens, budget)
            entries.append(entry(request, count, blocks, hit))
            room.free -= needed
            budget -= count
            seats -= 1
        return Schedule(state.index, tuple(entries), tuple(preempted), tuple(held))
