"""Routing policies: one a file, each a pure function from a request and the replicas' loads to a replica and a reason in words."""

from __future__ import annotations

from collections.abc import Callable

from armillary.core.errors import NotFoundError
from armillary.serve.policies.routing.cache_aware import CacheAware
from armillary.serve.policies.routing.consistent_hash import ConsistentHash
from armillary.serve.policies.routing.power_of_two import PowerOfTwo
from armillary.serve.policies.routing.round_robin import RoundRobin
from armillary.serve.policies.routing.shortest_queue import ShortestQueue
from armillary.serve.policies.routing.state import RoutingPolicy

DEFAULT = "cache-aware"
_POLICIES: dict[str, Callable[[], RoutingPolicy]] = {
    "cache-aware": CacheAware,
    "power-of-two": PowerOfTwo,
    "shortest-queue": ShortestQueue,
    "round-robin": RoundRobin,
    "consistent-hash": ConsistentHash,
}


def names() -> tuple[str, ...]:
    """The policies by name, the default first."""
    return tuple(_POLICIES)


def get(name: str) -> RoutingPolicy:
    """A policy by name. Raises NotFoundError."""
    if name not in _POLICIES:
        raise NotFoundError(f"no routing policy is called '{name}'", f"use one of: {', '.join(_POLICIES)}", field="router")
    return _POLICIES[name]()
