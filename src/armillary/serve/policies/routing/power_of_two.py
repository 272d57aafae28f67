"""The less loaded of two picked at random (Mitzenmacher, "The Power of Two Choices", TPDS 2001)."""

from __future__ import annotations

from hashlib import blake2b

from armillary.serve.policies.routing.state import Route, RouteState, shortest


class PowerOfTwo:
    """With n requests on n replicas the longest queue is about ln ln n instead of ln n / ln ln n, and no load needs to be exact.

    The two are a hash of the seed and the request's id, so that the same request is always decided alike.
    """

    name = "power-of-two"

    def step(self, state: RouteState) -> Route:
        count = len(state.replicas)
        if count == 1:
            return Route(state.replicas[0].index, "it is the only one that takes requests")
        digest = blake2b(f"{state.seed} {state.request_id}".encode(errors="surrogatepass"), digest_size=16).digest()
        first = int.from_bytes(digest[:8], "little") % count
        second = (first + 1 + int.from_bytes(digest[8:], "little") % (count - 1)) % count
        two = state.replicas[first], state.replicas[second]
        chosen = shortest(two)
        other = two[chosen is two[0]]
        return Route(
            chosen.index,
            f"of two picked by lot replica {chosen.index} ({chosen.waiting} waiting, {chosen.running} running) has no more to do than "
            f"replica {other.index} ({other.waiting} waiting, {other.running} running)",
        )
