"""What a router sees when a request comes, and what it decides: plain values."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from armillary.core.values import value


@value
class ReplicaView:
    """A replica that takes requests, as the router knows it from what it sent there and what came back.

    `matched`: how many of this request's first tokens the replica was sent before, and so may still have in its prefix cache.
    """

    index: int
    waiting: int = 0  # requests sent and not started
    running: int = 0  # requests started and not ended
    queued_tokens: int = 0  # prompt tokens sent and not started
    cached_tokens: int = 0  # of the prompts that it was sent and may still have
    matched: int = 0

    @property
    def requests(self) -> int:
        return self.waiting + self.running

    @property
    def load(self) -> int:
        """A request that waits weighs as much as four that run: it is a whole prompt, and a sign of more to come (vLLM's data-parallel router)."""
        return 4 * self.waiting + self.running


@value
class RouteState:
    """A request, and the replicas that may take it (at least one, in order of their index).

    `session` is what requests of one conversation have in common: its name where that is known, otherwise the name of their first block, which
    all who begin with one system prompt share, or their id when they have none.
    `turn` counts the decisions before this one.
    """

    request_id: str
    session: str
    prompt_tokens: int
    replicas: Sequence[ReplicaView]
    turn: int = 0
    seed: int = 0


@value
class Route:
    """Where a request goes; `reason` is shown to users."""

    replica: int
    reason: str


class RoutingPolicy(Protocol):
    """`core.contract.Policy` for routing: the same state gives the same route."""

    name: str

    def step(self, state: RouteState) -> Route: ...


def shortest(replicas: Iterable[ReplicaView]) -> ReplicaView:
    """The least loaded; of equals the one with fewer prompt tokens in its queue, then the first."""
    return min(replicas, key=lambda replica: (replica.load, replica.queued_tokens, replica.index))
