"""A session always goes to the same replica (rendezvous hashing, Thaler and Ravishankar 1998)."""

from __future__ import annotations

from hashlib import blake2b

from armillary.serve.policies.routing.state import Route, RouteState


class ConsistentHash:
    """Keeps a session's cache warm, and moves only a lost replica's sessions; but it is blind to load.

    A replica that got more sessions than its cache holds evicts each before it returns, and nothing ever moves away from it:
    cache-aware routing with a load override is the cure.
    """

    name = "consistent-hash"

    def step(self, state: RouteState) -> Route:
        def weight(index: int) -> bytes:
            return blake2b(f"{state.seed} {index} {state.session}".encode(errors="surrogatepass"), digest_size=8).digest()

        chosen = max((replica.index for replica in state.replicas), key=weight)
        return Route(chosen, f"its session belongs to replica {chosen}")
