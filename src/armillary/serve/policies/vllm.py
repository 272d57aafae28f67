"""vLLM: continuous batching over paged memory, one counter chasing another (vLLM v1; Kwon et al., SOSP 2023)."""

from __future__ import annotations

from collections.abc import Sequence

from armillary.serve.policies.entries import decode, drafts_that_fit, entry, is_decode, turned_away
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.policies.repetition import repeats
from armillary.serve.policies.victims import LAST, Victims
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Reason, Room, Schedule, State


class VLLM:
    """The loop of vLLM v1's scheduler, without its features.

    Running sequences come first, in the order of admission: each gets what it still needs, cut to the token budget. When
    the blocks run out `victims` says who is preempted (in vLLM the last admitted). Only when nobody was preempted is
    anyone admitted: in the order of `queue`, cut to the budget, and only while the *whole* sequence would fit the free
    blocks (without that, long prompts preempt each other for ever: vLLM issues 21793, 25538).
    Blocks are owned only for tokens that are computed or being computed.
    """

    name = "vllm"
    returns_together = False

    def __init__(self, queue: Queue | None = None, victims: Victims = LAST) -> None:
        self._queue = queue if queue is not None else Queue()
        self._victims = victims
        self.behind = self._queue.behind

    def step(self, state: State) -> Schedule:
        limits, room = state.limits, Room(state)
        preempted, running = self._victims.choose(state, _growth, room)
        budget = limits.max_batch_tokens
        entries: list[Entry] = []
        held: list[Hold] = []

        spare = budget - len(running)  # for drafts: they leave a token to everyone
        for request in running:
            count = min(request.known - request.computed, budget)
            if count == 0:
                held.append(Hold(request.id, Reason.NO_BUDGET))
                continue
            blocks = max(len(request.blocks), limits.blocks_for(request.computed + count))
            if is_decode(request):
                if not request.drafts:
                    entries.append(decode(request, request.known, blocks))
                    budget -= 1
                    continue
                drafts = drafts_that_fit(request, min(spare, budget - count), blocks - len(request.blocks) + room.free, limits.block_size)
                more = max(0, limits.blocks_for(request.known + drafts) - blocks)
                count, blocks = count + drafts, blocks + more
                room.free -= more
                spare -= drafts
            entries.append(entry(request, count, blocks))
            budget -= count

        seats = min(limits.max_running, limits.max_batch_tokens) - len(running)
        admitted: list[Request] = []
        for request in self._queue.waiting(state, turned_away(preempted, seats, budget)):
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
            admitted.append(request)
            room.free -= room.needed(blocks, hit)
            budget -= count
            seats -= 1
        told = self._queue.told(state, admitted, held)
        return Schedule(state.index, tuple(entries), preempted, told, self._queue.overdue(state, admitted))

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return repeats(state, schedule, self._queue)


def _growth(running: Sequence[Request], state: State) -> int:
    """Blocks that `running` need for what they get of the budget."""
    budget, blocks = state.limits.max_batch_tokens, 0
    for request in running:
        count = min(request.known - request.computed, budget)
        blocks += max(0, state.limits.blocks_for(request.computed + count) - len(request.blocks)) if count else 0
        budget -= count
    return blocks
