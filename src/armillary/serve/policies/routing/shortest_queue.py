"""The least loaded of all: what prefill workers are given (DistServe), and what cache-aware routing falls back to."""

from __future__ import annotations

from armillary.serve.policies.routing.state import Route, RouteState, shortest


class ShortestQueue:
    """Exact as long as one router sends everything; with several, all would choose the same replica."""

    name = "shortest-queue"

    def step(self, state: RouteState) -> Route:
        chosen = shortest(state.replicas)
        return Route(chosen.index, f"replica {chosen.index} has the least to do: {chosen.waiting} waiting, {chosen.running} running")
