"""Sarathi-Serve: decodes never wait for a prompt (Agrawal et al., OSDI 2024, algorithm 3)."""

from __future__ import annotations

from collections.abc import Sequence

from armillary.serve.policies.entries import decode, drafts_that_fit, entry, is_decode, turned_away
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.policies.repetition import repeats
from armillary.serve.policies.token_budget import TILE, tokens_within
from armillary.serve.policies.victims import LAST, Victims
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Reason, Room, Schedule, State


class Sarathi:
    """Stall-free batches: each iteration is all running decodes, then prompt chunks with what the token budget leaves.

    1. Every running decode gets its one token, and its drafts as far as they fit. When the blocks run out `victims` says who is
       preempted (recompute).
    2. Prompts that have begun continue, cut to the budget.
    3. If nobody was preempted, new sequences are admitted in the order of `queue`. Admission takes the blocks of the whole
       prompt at once, so that a prompt that has begun never waits for memory and prompts cannot preempt each other.

    The budget bounds every iteration's length, and so the time between two tokens of a running sequence: `tbt_target` ns, where
    given, for which the budget is found from what iterations take. A target that decodes alone exceed stops no
    prompt: it advances by a tile of tokens.
    """

    name = "sarathi"
    returns_together = False

    def __init__(self, queue: Queue | None = None, victims: Victims = LAST, tbt_target: int | None = None) -> None:
        self._queue = queue if queue is not None else Queue()
        self._victims = victims
        self._tbt_target = tbt_target
        self.behind = self._queue.behind

    def step(self, state: State) -> Schedule:
        limits, room = state.limits, Room(state)
        preempted, running = self._victims.choose(state, _growth, room)
        size = limits.block_size
        decodes: list[Request] = []
        prompts: list[Request] = []
        for request in running:
            (decodes if is_decode(request) else prompts).append(request)
        budget = self._budget(state, len(decodes))
        spent = Reason.NO_BUDGET if budget == limits.max_batch_tokens else Reason.NO_TIME
        entries: list[Entry] = []
        held: list[Hold] = []

        spare = budget - len(running)  # for drafts: they leave a token to everyone
        budget -= len(decodes)
        for request in decodes:
            known, owned = len(request.prompt) + len(request.output), len(request.blocks)
            blocks = owned if known <= owned * size else max(owned, limits.blocks_for(known))
            if not request.drafts:
                entries.append(decode(request, known, blocks))
                continue
            drafts = drafts_that_fit(request, spare, blocks - owned + room.free, size)
            more = max(0, limits.blocks_for(known + drafts) - blocks)
            entries.append(decode(request, known, blocks + more, drafts))
            room.free -= more
            budget -= drafts
            spare -= drafts

        for request in prompts:
            count = min(request.known - request.computed, budget)
            if count <= 0:
                held.append(Hold(request.id, spent))
                continue
            entries.append(entry(request, count, len(request.blocks)))
            budget -= count

        seats = min(limits.max_running, limits.max_batch_tokens) - len(running)
        admitted: list[Request] = []
        for request in self._queue.waiting(state, turned_away(preempted, seats, budget)):
            stop = turned_away(preempted, seats, budget, spent)
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
            admitted.append(request)
            room.free -= needed
            budget -= count
            seats -= 1
        told = self._queue.told(state, admitted, held)
        return Schedule(state.index, tuple(entries), preempted, told, self._queue.overdue(state, admitted))

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return repeats(state, schedule, self._queue, timed=self._tbt_target is not None)

    def _budget(self, state: State, decodes: int) -> int:
        """Tokens of this iteration. While nobody decodes there is no time between tokens to keep."""
        most = state.limits.max_batch_tokens
        if self._tbt_target is None or not decodes:
            return most
        return min(most, max(tokens_within(self._tbt_target, state.measured), decodes + TILE))


def _growth(running: Sequence[Request], state: State) -> int:
    """Blocks that the decodes among `running` need for their next token."""
    blocks, limits = 0, state.limits
    size = limits.block_size
    for request in running:
        owned = len(request.blocks)
        if (known := len(request.prompt) + len(request.output)) > owned * size and is_decode(request):
            blocks += max(0, limits.blocks_for(known) - owned)
    return blocks
