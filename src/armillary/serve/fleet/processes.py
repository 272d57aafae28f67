"""Replicas as processes of this machine: started, ended, and noticed when they end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

LAST_SECONDS = 3.0  # that a replica has to end by itself


class Started(Protocol):
    """A replica that was started: a way to talk to it, and a way to end it."""

    @property
    def connection(self) -> socket.socket: ...

    def end(self, *, now: bool = False) -> str:
        """See to it that it is gone; says how it ended. `now` does not let it finish."""
        ...


class Launcher(Protocol):
    """Starts replicas. May take seconds; called on a thread of its own."""

    def launch(self, index: int) -> Started: ...


@dataclass(frozen=True, slots=True)
class LocalProcess:
    """A child of this process. It ends when it finds the connection closed, also when this process dies."""

    process: subprocess.Popen[bytes]
    connection: socket.socket

    def end(self, *, now: bool = False) -> str:
        self.connection.close()
        try:
            if now:
                self.process.kill()
            code = self.process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        return f"signal {-code}" if code < 0 else f"status {code}"


class LocalLauncher:
    """Starts `armillary.serve.fleet.worker` with a socket whose other end only this process has."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        self._environment = dict(environment or {})

    def launch(self, index: int) -> LocalProcess:
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-m", "armillary.serve.fleet.worker", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=self._with_paths(),
            )
        return LocalProcess(process, ours)

    def _with_paths(self) -> dict[str, Any]:
        """What this process can import its replicas can, too."""
        paths = os.pathsep.join(path for path in sys.path if path)
        return {**os.environ, "PYTHONPATH": paths, **self._environment}
