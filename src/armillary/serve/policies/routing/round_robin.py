"""One after the other: the baseline."""

from __future__ import annotations

from armillary.serve.policies.routing.state import Route, RouteState


class RoundRobin:
    """Blind to load and to what is cached; right when all requests are alike."""

    name = "round-robin"

    def step(self, state: RouteState) -> Route:
        chosen = state.replicas[state.turn % len(state.replicas)]
        return Route(chosen.index, f"it was replica {chosen.index}'s turn")
