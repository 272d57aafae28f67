"""An executor without tensors, in virtual time: tokens from a function, durations from a cost."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

from armillary.core.clock import VirtualClock
from armillary.serve.engine import Engine
from armillary.serve.request import Request, TokenLogprob
from armillary.serve.schedule import Entry, Outcome, Plan

TokenAt = Callable[[Request, int], int]
Cost = Callable[[Plan], int]


def hashed_token(request: Request, position: int) -> int:
    """A token (0..49,999) that depends on the request's prompt and on the position, and on nothing else."""
    return zlib.crc32(repr((request.prompt, position)).encode()) % 50_000


def unit_cost(duration: int = 1) -> Cost:
    """Every iteration takes `duration` ns, whatever is in it."""
    return lambda plan: duration


def linear_cost(fixed: float, per_token: float, per_cached: float = 0.0) -> Cost:
    """ns: `fixed` + `per_token` x tokens computed + `per_cached` x cached tokens read by the iteration's attention."""

    def cost(plan: Plan) -> int:
        cached = sum(entry.start for entry in plan.schedule.entries)
        return round(fixed + per_token * plan.schedule.tokens + per_cached * cached)

    return cost


class ScriptedExecutor:
    """Draws `token(request, position)` for the token at `position` and moves `clock` by `cost(plan)` an iteration."""

    def __init__(self, clock: VirtualClock, *, token: TokenAt = hashed_token, cost: Cost | None = None) -> None:
        self.clock = clock
        self._token = token
        self._cost = cost if cost is not None else unit_cost()

    def run(self, plan: Plan) -> Outcome:
        start = self.clock.now()
        end = self.clock.advance(self._cost(plan))
        sampled = tuple(self._drawn(request, entry) for entry, request in zip(plan.schedule.entries, plan.requests, strict=True))
        return Outcome(sampled, ((),) * len(sampled), start, end)

    def _drawn(self, request: Request, entry: Entry) -> tuple[TokenLogprob, ...]:
        """The tokens after the known ones, as far as the drafts are right, and one more."""
        tokens: list[TokenLogprob] = []
        for ahead in range(entry.drafts + 1 if entry.sample else 0):
            tokens.append(TokenLogprob(self._token(request, request.known + ahead)))
            if ahead < entry.drafts and tokens[-1].token != request.drafts[ahead]:
                break
        return tuple(tokens)


def replay(engine: Engine, clock: VirtualClock, requests: Sequence[Request]) -> None:
    """Run `requests` to their end, each submitted when virtual time reaches its `arrival` (ns; None is at once)."""
    coming = sorted(requests, key=lambda request: request.arrival or 0)
    following = 0
    while True:
        while following < len(coming) and (coming[following].arrival or 0) <= clock.now():
            engine.submit(coming[following])
            following += 1
        if engine.step():
            continue
        if following == len(coming):
            engine.check()
            return
        clock.advance_to(coming[following].arrival or 0)
