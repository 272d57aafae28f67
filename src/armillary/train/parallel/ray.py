"""Ranks as Ray actors in a placement group; when one is lost, all begin again from the last checkpoint."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Callable
from typing import Any

from armillary.core.errors import CapacityError, MissingDependencyError
from armillary.train.parallel.launch import PeerError

PLACE_SECONDS = 60.0

Work = Callable[[int], Any]
"""What a rank does, given the attempt (0, 1, ...); RANK and WORLD_SIZE are in its environment, as torchrun sets them."""


class _Rank:
    """One rank's process."""

    def where(self) -> tuple[str, int, int]:
        """(address, a free port, process id)."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return _ray().util.get_node_ip_address(), probe.getsockname()[1], os.getpid()

    def run(self, environment: dict[str, str], work: Work, attempt: int) -> Any:
        os.environ |= environment
        return work(attempt)


def run_on_ray(world: int, work: Work, *, cpus: float = 1, restarts: int = 3, tell: Callable[[str], None] = print) -> list[Any]:
    """`work(attempt)` on `world` actors of `cpus` CPUs each. Returns the results in rank order.

    Uses the cluster that RAY_ADDRESS names, else one on this machine. When an actor dies, or a rank ends with a PeerError
    because another did, all are started again, with the next `attempt`, at most `restarts` times: `work` goes on
    from its last checkpoint. Any other error of a rank is raised here. Raises CapacityError when the ranks do not fit.
    """
    ray = _ray()
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="error", runtime_env={"env_vars": _inherited()})
    group = _place(ray, world, cpus, tell)
    try:
        for attempt in range(restarts + 1):
            lost = _attempt(ray, group, world, cpus, work, attempt, tell)
            if isinstance(lost, list):
                return lost
            tell(f"{lost}; starting all {world} ranks again from the last checkpoint ({attempt + 1} of {restarts} restarts)")
        raise PeerError(f"{lost}, after {restarts} restarts", "look at the ranks' logs (ray logs); then resume the run")
    finally:
        ray.util.remove_placement_group(group)


def _attempt(ray: Any, group: Any, world: int, cpus: float, work: Work, attempt: int, tell: Callable[[str], None]) -> list[Any] | str:
    """The results, or which rank was lost."""
    strategy = importlib.import_module("ray.util.scheduling_strategies").PlacementGroupSchedulingStrategy
    actor = ray.remote(_Rank)
    ranks = [
        actor.options(num_cpus=cpus, max_restarts=0, scheduling_strategy=strategy(group, placement_group_bundle_index=index)).remote()
        for index in range(world)
    ]
    try:
        places = ray.get([rank.where.remote() for rank in ranks])
        for number, (host, _, process) in enumerate(places):
            tell(f"rank {number}: process {process} on {host}")
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": places[0][0], "MASTER_PORT": str(places[0][1])}
        running = {rank.run.remote({**shared, "RANK": str(number)}, work, attempt): number for number, rank in enumerate(ranks)}
        results: dict[int, Any] = {}
        while len(results) < world:
            (done, *_), _ = ray.wait([future for future, number in running.items() if number not in results])
            try:
                results[running[done]] = ray.get(done)
            except ray.exceptions.RayActorError:
                return f"rank {running[done]} is gone"
            except ray.exceptions.RayTaskError as error:
                if not isinstance(error.cause, PeerError):
                    raise error.cause from error
                return error.cause.problem
        return [results[number] for number in range(world)]
    finally:
        for rank in ranks:
            ray.kill(rank)


def _place(ray: Any, world: int, cpus: float, tell: Callable[[str], None]) -> Any:
    """Room for all ranks at once, close together: none starts alone and waits for the others."""
    have = ray.cluster_resources().get("CPU", 0)
    fix = "use a larger cluster (RAY_ADDRESS), or a layout of fewer ranks"
    if have < world * cpus:
        raise CapacityError(f"{world} ranks want {world * cpus:g} CPUs, and Ray's cluster has {have:g}", fix)
    group = ray.util.placement_group([{"CPU": cpus}] * world, strategy="PACK")
    if not group.wait(PLACE_SECONDS):
        ray.util.remove_placement_group(group)
        raise CapacityError(f"Ray found no room for {world} ranks of {cpus:g} CPUs within {PLACE_SECONDS:g} s", fix)
    tell(f"Ray: {world} ranks in a placement group on a cluster of {have:g} CPUs")
    return group


def _inherited() -> dict[str, str]:
    """What a rank must see as this process does."""
    return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user asks for it
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingDependencyError("ray is not installed", "pip install 'armillary[ray]', or start the ranks with torchrun") from None
