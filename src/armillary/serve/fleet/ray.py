"""Replicas as Ray actors: on this machine, or wherever the cluster has room."""

from __future__ import annotations

import contextlib
import importlib
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from typing import Any, Final

from armillary.core.errors import CapacityError, MissingDependencyError

PLACE_SECONDS: Final = 120.0  # that Ray has to start an actor, and the actor to connect
_SECRET_BYTES: Final = 32


class _Replica:
    """The process of a replica: connects to the router, says the secret, and serves until the router hangs up."""

    def serve(self, host: str, port: int, secret: bytes) -> None:
        from armillary.serve.fleet.worker import serve

        with socket.create_connection((host, port), timeout=PLACE_SECONDS) as connection:
            connection.settimeout(None)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.sendall(secret)
            serve(connection)


@dataclass(frozen=True, slots=True)
class RayActor:
    """An actor that has connected. Ray does not restart it: the fleet does, and knows what it had."""

    ray: Any
    actor: Any
    connection: socket.socket

    def end(self, *, now: bool = False) -> str:
        self.connection.close()
        with contextlib.suppress(Exception):  # it may be gone, with its machine
            self.ray.kill(self.actor)
        return "the actor is gone"


class RayLauncher:
    """Uses the cluster that RAY_ADDRESS names, else one on this machine. Each actor takes `cpus` CPUs.

    Only who knows a secret of 32 random bytes, which Ray carries to the actor, is taken for a replica.
    """

    def __init__(self, replicas: int, cpus: float) -> None:
        self._ray = _ray()
        if not self._ray.is_initialized():
            self._ray.init(include_dashboard=False, logging_level="error", log_to_driver=False)
        have = self._ray.cluster_resources().get("CPU", 0)
        if have < replicas * cpus:
            raise CapacityError(
                f"{replicas} replicas of {cpus:g} threads want {replicas * cpus:g} CPUs, and Ray's cluster has {have:g}",
                "give fewer --replicas or --threads, or use a larger cluster (RAY_ADDRESS)",
                field="replicas",
            )
        self._cpus = cpus

    def launch(self, index: int) -> RayActor:
        """Raises CapacityError when no actor connects in time."""
        address = self._ray.util.get_node_ip_address()
        secret = secrets.token_bytes(_SECRET_BYTES)
        with socket.create_server((address, 0)) as server:
            server.settimeout(PLACE_SECONDS)
            paths = os.pathsep.join(path for path in sys.path if path)  # what this process can import an actor can, too
            environment = {"env_vars": {"PYTHONPATH": paths, "OMP_NUM_THREADS": str(max(1, round(self._cpus)))}}
            actor = self._ray.remote(_Replica).options(num_cpus=self._cpus, max_restarts=0, runtime_env=environment).remote()
            actor.serve.remote(address, server.getsockname()[1], secret)
            try:
                while True:
                    connection, _ = server.accept()
                    if _knows(connection, secret):
                        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return RayActor(self._ray, actor, connection)
                    connection.close()
            except TimeoutError:
                self._ray.kill(actor)
                raise CapacityError(
                    f"replica {index} did not connect within {PLACE_SECONDS:g} s", "see Ray's logs (ray logs), or use a larger cluster"
                ) from None


def _knows(connection: socket.socket, secret: bytes) -> bool:
    connection.settimeout(5.0)
    said = b""
    with contextlib.suppress(OSError):
        while len(said) < len(secret) and (more := connection.recv(len(secret) - len(said))):
            said += more
    return secrets.compare_digest(said, secret)


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere unless the user asks for it
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise MissingDependencyError("ray is not installed", "pip install 'armillary[ray]', or leave --ray out") from None
