"""Iterations that repeat: how many there can be, and what they do to memory, in the order in which stepping would do it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from armillary.serve.request import Request
from armillary.serve.schedule import Limits, Plan, Reason


@dataclass(slots=True)
class Leap:
    """A plan, and when each of the iterations that repeat it ends (ns, rising). The first has begun; the others can still be called off."""

    plan: Plan
    start: int
    ends: NDArray[np.int64]  # [iterations]

    def until(self, instant: int) -> int:
        """How many iterations have begun when something comes at `instant`: it is seen when the last of these has ended."""
        count = len(self.ends)
        return count if count == 1 else min(count, int(self.ends.searchsorted(instant)) + 1)


def only_decodes(plan: Plan, running: Sequence[Request]) -> bool:
    """Whether a plan is one token for everything that runs, and nothing else.

    Sequences that may end by what they say, or whose listeners are to be told of every token, do not count: they are stepped.
    """
    schedule, decode = plan.schedule, Reason.DECODE
    if schedule.preempted or schedule.overdue or plan.copies or len(schedule.entries) != len(running):
        return False
    for entry in schedule.entries:
        if entry.reason is not decode or entry.count != 1 or not entry.sample:
            return False
    return all(map(silent, plan.requests))


def silent(request: Request) -> bool:
    """Whether nothing but its length can end the sequence, and nobody is told of its tokens."""
    sampling = request.sampling
    return (
        request.on_event is None
        and sampling.ignore_eos
        and not sampling.stop_token_ids
        and sampling.logprobs is None
        and request.constraint is None
        and request.text is None
    )


def first_end(requests: Sequence[Request]) -> int:
    """In which iteration from now on the first sequence ends, from 1."""
    return min(request.sampling.max_tokens - len(request.output) for request in requests)


def first_full(plan: Plan, block_size: int) -> int:
    """The iteration, from 1, at whose end a block becomes full: others may find it then, and with what they share those who wait may fit."""
    return 1 + min(-(entry.start + 1) % block_size for entry in plan.schedule.entries)


def affordable(requests: Sequence[Request], limits: Limits, count: int, free: int) -> int:
    """How many of `count` iterations `free` blocks allow; the first has its blocks already."""
    size, wanted = limits.block_size, 0
    for request in requests:
        wanted += max(0, -(-(len(request.prompt) + len(request.output) + count - 1) // size) - len(request.blocks))
    if wanted <= free:
        return count
    return sorted(chain(*(growths(request, request.known, size, count) for request in requests)))[free]


def growths(request: Request, known: int, size: int, count: int) -> range:
    """Which of `count` iterations take a block after the first: iteration i computes the token at `known` - 1 + i."""
    return range(max(1, len(request.blocks) * size - known + 1), count, size)
