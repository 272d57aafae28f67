"""Where its beginning is already computed, unless that replica has too much to do (SGLang's router)."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.serve.policies.routing.state import Route, RouteState, shortest


@dataclass(frozen=True, slots=True)
class CacheAware:
    """1. Loads apart by over `imbalance` requests and by over `ratio` times: the shortest queue, whatever is cached.
    2. More than `threshold` of the prompt was sent to a replica before: the one with the longest match.
    3. Otherwise the least loaded, and of equals the one that was sent the fewest tokens, so that caches fill evenly.

    Without the first rule affinity alone puts all load on few replicas.
    """

    imbalance: int = 8  # SGLang: 64, for batches of a GPU
    ratio: float = 1.5
    threshold: float = 0.5

    name = "cache-aware"

    def step(self, state: RouteState) -> Route:
        replicas = state.replicas
        most, least = max(r.requests for r in replicas), min(r.requests for r in replicas)
        best = min(replicas, key=lambda r: (-r.matched, r.load, r.index))
        cached = f"replica {best.index} was sent {best.matched} of its {state.prompt_tokens} tokens before"
        if most - least > self.imbalance and most > self.ratio * least:
            chosen = shortest(replicas)
            known = f", although {cached}" if best.matched > chosen.matched else ""
            return Route(
                chosen.index, f"the load is uneven ({least} to {most} requests) and replica {chosen.index} has the least to do{known}"
            )
        if best.matched > self.threshold * state.prompt_tokens:
            return Route(best.index, cached)
        chosen = min(replicas, key=lambda r: (r.load, r.cached_tokens, r.index))
        return Route(
            chosen.index, f"no replica was sent much of it before, and replica {chosen.index} has the least to do, or the emptiest cache"
        )
