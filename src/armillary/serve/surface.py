"""What serves requests, seen from outside: one engine, or a fleet of them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Protocol

from armillary.core.clock import Clock
from armillary.serve.config import EngineConfig
from armillary.serve.history import EngineStats
from armillary.serve.request import Request
from armillary.serve.schedule import Limits, SchedulerPolicy


class Adapters(Protocol):
    """What requests may run with beside the model itself, by name (`adapters.AdapterStore`, or a fleet's names)."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def is_ready(self, name: str) -> bool:
        """Whether `key` would answer at once."""
        ...

    def prepare(self, name: str) -> object:
        """Takes the time that `key` would."""
        ...

    def key(self, name: str) -> str:
        """What a request carries. Raises NotFoundError with the closest name."""
        ...

    def load(self, name: str, path: Path) -> object:
        """Serve the peft folder at `path` as `name` from now on; requests that run keep the weights they have. Takes its time."""
        ...

    def unload(self, name: str) -> None:
        """Raises NotFoundError with the closest name."""
        ...


class Serving(Protocol):
    """`Engine` and `Fleet`. `config` and `limits` are what bounds one request: of a fleet, those of one replica."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def limits(self) -> Limits: ...

    @property
    def clock(self) -> Clock: ...

    @property
    def policy(self) -> SchedulerPolicy: ...

    @property
    def eos_ids(self) -> Collection[int]: ...

    @property
    def adapters(self) -> Adapters | None: ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def alive(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def cancel(self, request_id: str) -> bool: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def run_until_idle(self) -> None: ...

    def snapshot(self, since: int = -1) -> dict[str, Any]: ...

    def explain(self, request_id: str) -> list[str] | None: ...
