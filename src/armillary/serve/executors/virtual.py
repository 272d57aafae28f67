"""Carries plans out in virtual time: no tensors, tokens by a rule, durations from a cost model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from armillary.core.clock import VirtualClock
from armillary.serve.request import Request, TokenLogprob
from armillary.serve.schedule import Entry, Outcome, Plan, Reason
from armillary.sim.batch import Batch, Read
from armillary.sim.costs import CostModel
from armillary.sim.costs.overlapped import Overlapped

Drawn = Callable[[Request, int], int]
"""The token at a position of a request, that nobody has to compute."""

BLANK = 0  # the token of a sequence whose text is of no account


def batch_of(plan: Plan) -> Batch:
    """What of a plan its cost depends on. One token that follows computed ones is a decode to the device, whatever it is to the scheduler."""
    prompts: list[tuple[int, int]] = []
    decodes, cached, sampled, decode = 0, 0, 0, Reason.DECODE
    for entry in plan.schedule.entries:
        if entry.count == 1 and (entry.start or entry.reason is decode):
            decodes += 1
            cached += entry.start
        else:
            prompts.append((entry.count, entry.start))
        if entry.sample:
            sampled += 1 + entry.drafts
    return Batch(tuple(prompts), decodes, cached, sampled)


class VirtualExecutor:
    """`Executor[Plan, Outcome]` that moves `clock` by `cost` an iteration.

    `drawn` names the tokens; without it all are `BLANK` (a simulation of lengths alone). `reads`: what a plan's attention reads where a KV
    policy does not let it read everything. `beside`: ns of an iteration that depend on whose it is (adapters), not on tokens that have been computed.
    """

    def __init__(
        self,
        clock: VirtualClock,
        cost: CostModel,
        drawn: Drawn | None = None,
        reads: Callable[[Plan], Read] | None = None,
        beside: Callable[[Plan], int] | None = None,
    ) -> None:
        self.clock, self.cost, self.beside = clock, cost, beside
        self._drawn, self._reads = drawn, reads

    def run(self, plan: Plan) -> Outcome:
        start = self.clock.now()
        end = start + self.duration(plan)
        self.clock.advance_to(end)
        return self.outcome(plan, start, end)

    def duration(self, plan: Plan, *, ahead: bool = False) -> int:
        """ns that the iteration takes; `ahead`: its schedule was made while the one before it ran."""
        more = self.beside(plan) if self.beside is not None else 0
        if ahead and isinstance(self.cost, Overlapped):
            return self.cost.ahead(self._batch(plan), more)
        return self.cost.iteration(self._batch(plan)) + more

    def _batch(self, plan: Plan) -> Batch:
        batch = batch_of(plan)
        return batch if self._reads is None else Batch(batch.prompts, batch.decodes, batch.cached, batch.sampled, self._reads(plan))

    def durations(self, plan: Plan, count: int) -> NDArray[np.int64]:
        """ns of `count` iterations of the decodes of `plan`, one after another. [count]"""
        entries = plan.schedule.entries
        each = self.cost.decodes(len(entries), sum([entry.start for entry in entries]), count)
        return each if self.beside is None else each + self.beside(plan)

    def outcome(self, plan: Plan, start: int, end: int) -> Outcome:
        """What an iteration from `start` to `end` gives."""
        blank = self._drawn is None
        drawn = tuple(
            [
                _BLANK if blank and entry.sample and not entry.drafts else self._tokens(request, entry)
                for entry, request in zip(plan.schedule.entries, plan.requests, strict=True)
            ]
        )
        return Outcome(drawn, ((),) * len(drawn), start, end)

    def tokens(self, request: Request, count: int) -> list[int]:
        """The next `count` tokens of a request."""
        if self._drawn is None:
            return [BLANK] * count
        known = request.known
        return [self._drawn(request, position) for position in range(known, known + count)]

    def _tokens(self, request: Request, entry: Entry) -> tuple[TokenLogprob, ...]:
        """The tokens after the known ones, as far as the drafts are right, and one more."""
        if not entry.sample:
            return ()
        known, drafts, tokens = request.known, request.drafts[: entry.drafts], list[TokenLogprob]()
        for ahead in range(entry.drafts + 1):
            tokens.append(TokenLogprob(self._drawn(request, known + ahead) if self._drawn is not None else BLANK))
            if ahead < len(drafts) and tokens[-1].token != drafts[ahead]:
                break
        return tuple(tokens)


_BLANK = (TokenLogprob(BLANK),)
