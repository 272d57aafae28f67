"""The executor in virtual time as the tests of the engine want it: durations by plan, tokens by position, requests as they come."""

import zlib

from armillary.serve.executors.virtual import VirtualExecutor
from armillary.sim.costs import Decoding, Linear

NO_COST = Linear("by plan", 0, 0, 0, Decoding(0, 0, 0))


def hashed_token(request, position):
    """A token (0..49,999) that depends on the request's prompt and on the position, and on nothing else."""
    return zlib.crc32(repr((request.prompt, position)).encode()) % 50_000


def linear_cost(fixed, per_token, per_cached=0.0):
    """ns: `fixed` + `per_token` x tokens computed + `per_cached` x cached tokens read by the iteration's attention."""

    def cost(plan):
        cached = sum(entry.start for entry in plan.schedule.entries)
        return round(fixed + per_token * plan.schedule.tokens + per_cached * cached)

    return cost


class TimedExecutor(VirtualExecutor):
    """Iterations take `cost(plan)` ns, by default one."""

    def __init__(self, clock, *, token=hashed_token, cost=None):
        super().__init__(clock, NO_COST, token)
        self._takes = cost or linear_cost(1, 0)

    def duration(self, plan):
        return self._takes(plan)


def replay(engine, clock, requests):
    """Run `requests` to their end, step by step, each submitted when virtual time reaches its `arrival` (ns; None is at once)."""
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
