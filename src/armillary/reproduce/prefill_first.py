"""vLLM before its v1, which these papers measured: prompts first and whole, while answers stand still (Kwon et al., SOSP 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from armillary.serve.policies.entries import decode, entry, turned_away
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.policies.repetition import repeats
from armillary.serve.policies.victims import LAST
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Reason, Room, Schedule, State

WATERMARK = 0.01
"""Of the KV blocks, the share that stays free when anyone is admitted (vLLM's default, and Vidur's)."""


class PrefillFirst:
    """An iteration is prompts or decodes, never both.

    Whoever waits is admitted, first come, first served, as far as whole prompts fit the token budget, the seats and the free KV blocks; then nobody
    decodes. An iteration in which nobody is admitted is one token for all that run; where blocks run out the last admitted is preempted
    and computed again. The `vllm` of `serve/policies` is v1's loop, which decodes in every iteration. No drafts, no shared prefixes.
    """

    name = "prefill-first"
    returns_together = False
    behind = Reason.QUEUE_ORDER

    def step(self, state: State) -> Schedule:
        limits, room = state.limits, Room(state)
        kept = int(WATERMARK * limits.total_blocks) if state.running else 0
        seats, budget = min(limits.max_running, limits.max_batch_tokens) - len(state.running), limits.max_batch_tokens
        entries, held = list[Entry](), list[Hold]()
        for request in state.waiting:
            blocks = limits.blocks_for(request.known)
            stop = turned_away((), seats, budget)
            if stop is None and blocks > room.free - kept:
                stop = Reason.NO_BLOCKS
            if stop is None and request.known > budget and entries:
                stop = Reason.NO_BUDGET
            if stop is not None:
                held.append(Hold(request.id, stop))
                break
            entries.append(entry(request, request.known, blocks))
            room.free -= blocks
            budget -= request.known
            seats -= 1
            kept = int(WATERMARK * limits.total_blocks)
            if budget <= 0:
                break
        if entries:
            return Schedule(state.index, tuple(entries), (), tuple(held))
        preempted, running = LAST.choose(state, _growth, room)
        decodes = [decode(request, request.known, max(len(request.blocks), limits.blocks_for(request.known))) for request in running]
        return Schedule(state.index, tuple(decodes), preempted, tuple(held))

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return repeats(state, schedule, Queue())


def _growth(running: Sequence[Request], state: State) -> int:
    """Blocks that `running` need for their next tokens."""
    return sum(max(0, state.limits.blocks_for(request.known) - len(request.blocks)) for request in running)
