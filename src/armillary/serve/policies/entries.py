"""How a policy names one sequence's share of an iteration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hit, Preemption, Reason

_DECODE: Final = Reason.DECODE  # a member is looked up in 60 ns, and there is one a token


def is_decode(request: Request) -> bool:
    """One new token for a sequence whose cache is complete but for it."""
    output = request.output
    return len(output) > 0 and len(request.prompt) + len(output) - request.computed == 1


def entry(request: Request, count: int, blocks: int, hit: Hit = Hit()) -> Entry:  # noqa: B008
    """Compute `count` tokens more of `request`, which then owns `blocks` KV blocks. `hit`: what it begins with where it is admitted.

    What `count` has beyond the known tokens are drafts.
    """
    start = max(request.computed, hit.tokens)
    left = request.known - start
    if is_decode(request):
        reason = Reason.DECODE
    elif request.preemptions > 0:
        reason = Reason.RECOMPUTE
    else:
        reason = Reason.PROMPT if count >= left else Reason.CHUNK
    samples = count >= left and request.sampling.max_tokens > 0  # max_tokens 0: only the prompt is scored
    return Entry(request.id, start, count, samples, blocks, reason, max(0, count - left))


def decode(request: Request, known: int, blocks: int, drafts: int = 0) -> Entry:
    """`entry` for a decode of `known` known tokens, with so many of its drafts."""
    return Entry(request.id, known - 1, 1 + drafts, True, blocks, _DECODE, drafts)


def drafts_that_fit(request: Request, tokens: int, blocks: int, block_size: int) -> int:
    """How many of a decode's drafts can be verified with `tokens` of the budget to spare and `blocks` KV blocks free.

    A draft preempts nobody: it is dropped where there is no room for it.
    """
    slots = (len(request.blocks) + max(0, blocks)) * block_size - request.known
    return max(0, min(len(request.drafts), tokens, slots))


def turned_away(preempted: Sequence[Preemption], seats: int, budget: int, spent: Reason = Reason.NO_BUDGET) -> Reason | None:
    """Why nobody can be admitted any more, whoever it is; `spent` is what a spent budget is called.

    Asked before the queue is put in order and before a hit, which cost time in the length of the queue and of the prompt.
    """
    if preempted:
        return Reason.NO_BLOCKS
    if seats <= 0:
        return Reason.NO_SEAT
    return spent if budget <= 0 else None
