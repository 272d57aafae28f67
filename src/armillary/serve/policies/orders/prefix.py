"""Longest prefix match: the cache's branches are walked depth first (Zheng et al., SGLang, NeurIPS 2024)."""

from __future__ import annotations

from armillary.serve.policies.orders.queue import Key
from armillary.serve.request import Request
from armillary.serve.schedule import State

WINDOW = 128  # sequences; SGLang too looks for no matches in a longer queue


def key(state: State, max_wait: int | None) -> Key:
    """By how much of a sequence the prefix cache has now, so that a branch is used up before another evicts it.

    Age counts as match: who has waited half of `max_wait` ns is taken for one of which half was found, so that strangers are not
    kept waiting by a popular prompt. A preempted sequence has begun to answer, and goes before those that have not.
    """

    def unmatched(request: Request) -> tuple[bool, int]:
        matched = state.memory.hit(request).tokens
        if max_wait and request.arrival is not None:
            matched = matched * max_wait + request.known * (state.now - request.arrival)  # in whole numbers: equals stay equal
        return request.preemptions == 0, -matched

    return unmatched
