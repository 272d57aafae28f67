"""vLLM: continuous batching over paged memory, one counter chasing another (vLLM v1; Kwon et al., SOSP 2023)."""

from __future__ import annotations

from armillary.serve.policies.entries import drafts_that_fit, entry, is_decode, preemption, turned_away
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Preemption, Reason, Room, Schedule, State


class VLLM:
    """The loop of vLLM v1's scheduler, without its features.

    Running sequences come first, in the order of admission: each gets what it still needs, cut to the token budget. When
    the blocks run out the last admitted is preempted, until there is room or the sequence itself was the last. Only when
    nobody was preempted is anyone admitted: in queue order, cut to the budget, and only while the *whole* sequence would
    fit the free blocks (without that, long prompts preempt each other for ever: vLLM issues 21793, 25538).
    Blocks are owned only for tokens that are computed or being computed.
    """

    name = "vllm"
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
            count = min(request.known - request.computed, budget)
            if count == 0:
                held.append(Hold(request.id, Reason.NO_BUDGET))
                position += 1
                continue
            blocks = max(len(request.blocks), limits.blocks_for(request.computed + count))
            while blocks - len(request.blocks) > room.free and position < len(running):
                victim: Request = running.pop()
                preempted.append(preemption(victim, room))
            if position == len(running):  # it was the last itself
                break
            if is_decode(request):
                drafts = drafts_that_fit(request, min(spare, budget - count), room.free, limits.block_size)
                count, spare = count + drafts, spare - drafts
                blocks = max(blocks, limits.blocks_for(request.computed + count))
            entries.append(entry(request, count, blocks))
            room.free -= blocks - len(request.blocks)
            budget -= count
            position += 1

        seats = min(limits.max_running, limits.max_batch_tokens) - len(running)
        for request in state.waiting:
            stop = turned_away(preempted, seats, budget)
            if stop is None:
                hit = state.memory.hit(request)
                if room.needed(limits.blocks_for(request.known), hit) > room.free:
                    stop = Reason.NO_BLOCKS
            if stop is not None:
                held.append(Hold(request.id, stop))
                break
            count = min(request.known - hit.tokens, budget)
            blocks = limits.blocks_for(hit.tokens + count)
            entries.append(entry(request, count, blocks, hit))
            room.free -= room.needed(blocks, hit)
            budget -= count
            seats -= 1
        return Schedule(state.index, tuple(entries), tuple(preempted), tuple(held))
