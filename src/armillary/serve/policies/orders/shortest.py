"""Shortest job first: the least mean latency of all orders (Smith 1956)."""

from __future__ import annotations

from armillary.serve.policies.orders.queue import Key
from armillary.serve.request import Request
from armillary.serve.schedule import State

LONGEST_ANSWER = 256  # tokens


def key(state: State) -> Key:
    """By the tokens that a sequence has still to compute: those of its prompt, and those of its answer up to `LONGEST_ANSWER`.

    The prompt is known. The answer is bounded by `max_tokens`: a client's word for a short one, but no expectation of a
    long one (a chat that names no bound may fill the context). So a bound above what conversations come to (211 tokens
    on average in Azure's trace of 2023) counts as no more than that. What the prefix cache has is not asked: that would cost time in
    the length of every waiting prompt. A preempted sequence has begun to answer, and goes before those that have not.
    """

    def work(request: Request) -> tuple[bool, int]:
        answer = request.sampling.max_tokens - len(request.output)
        return request.preemptions == 0, request.known - request.computed + min(answer, LONGEST_ANSWER)

    return work
