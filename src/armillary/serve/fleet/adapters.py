"""A fleet's adapters: loaded on every replica or on none, given to those that are started later, dropped when nobody uses them."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.models.lora_config import check_name
from armillary.serve.adapters import MAX_NAMES, unknown
from armillary.serve.fleet.messages import Message, unpack_error

LOAD_SECONDS: Final = 120.0  # that replicas have to load an adapter
KEPT_SECONDS: Final = 10.0  # that a version stays after its name has gone, for requests that are on their way with it


@dataclass(slots=True, eq=False)
class Version:
    """An adapter as it was loaded under a name. On replicas it is called `key`, so that two versions of a name never meet."""

    name: str
    key: str
    path: str
    digest: str | None = None  # of its files, by the first replica that has read them
    served: bool = False  # a name stands for it, or did
    gone: float | None = None  # when its name was given to another, or unloaded
    waiting: set[int] = field(default_factory=set)  # replicas that are loading it
    loaded: set[int] = field(default_factory=set)  # and those that have
    error: ArmillaryError | None = None


class FleetAdapters:
    """`surface.Adapters` over replicas. `load` and `unload` may be called from any thread; the rest under `changed`, whose lock is the fleet's.

    A replica takes requests once it has all that are served: `greet` asks it to load them, and `heard` says when it has. A load asks
    all that take requests, and counts when the last has answered; who fails it is named, and nobody keeps it.
    """

    def __init__(self, folders: Mapping[str, str], changed: threading.Condition, send: Callable[[int, Message], None]) -> None:
        self._changed, self._send = changed, send
        self._numbers = itertools.count(1)
        self._versions: dict[str, Version] = {}  # by key: all that replicas should have
        self._current: dict[str, Version] = {}  # by name
        self._there: set[int] = set()  # replicas that can be asked
        self._joining: dict[int, set[str]] = {}  # what each has to load before it takes requests
        self._loading = threading.Lock()  # one at a time
        for name, path in folders.items():
            self._current[name] = version = self._version(name, path)
            version.served = True

    # -- surface.Adapters

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._current)

    def is_ready(self, name: str) -> bool:
        return True

    def prepare(self, name: str) -> None: ...

    def key(self, name: str) -> str:
        """Raises NotFoundError with the closest name."""
        version = self._current.get(name)
        if version is None:
            raise unknown(name, self.names)
        return version.key

    def load(self, name: str, path: str | Path) -> None:
        """Serve the peft folder at `path`, which every replica must see, as `name`: from the moment that all have it.

        Raises what a replica raised, with its number; CapacityError when one does not answer in time, or none lives.
        """
        check_name(name)
        with self._loading, self._changed:
            if name not in self._current and len(self._current) >= MAX_NAMES:
                raise CapacityError(f"there are {MAX_NAMES:,} adapters already", "unload one first")
            version = self._version(name, str(Path(path).absolute()))
            for index in sorted(self._there):
                self._ask(index, version)
            deadline = time.monotonic() + LOAD_SECONDS
            while version.waiting and version.error is None and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            error = version.error
            if error is None and version.waiting:
                late = ", ".join(map(str, sorted(version.waiting)))
                error = CapacityError(
                    f"replica {late} has not loaded adapter {name!r} within {LOAD_SECONDS:g} s",
                    "try again when it is well",
                    field="lora_name",
                )
            if error is None and not version.loaded:
                error = CapacityError("no replica lives that could load an adapter", "come back when one has been started")
            if error is not None:
                self._drop(version)
                raise error
            old = self._current.get(name)
            self._current[name], version.served = version, True
            if old is not None:
                old.gone = time.monotonic()

    def unload(self, name: str) -> None:
        """`name` is served no longer; requests that run go on. Raises NotFoundError, with the closest name."""
        with self._changed:
            version = self._current.pop(name, None)
            if version is None:
                raise unknown(name, self.names, "lora_name")
            version.gone = time.monotonic()

    def state(self, reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """`AdapterStore.state` of all replicas, from those of each: memory and requests added. None while there are no adapters."""
        versions = [version for version in self._versions.values() if version.served]
        if not versions:
            return {}
        found: dict[str, list[Mapping[str, Any]]] = {version.key: [] for version in versions}
        for row in (row for report in reports for row in report["adapters"]):
            found.get(row["name"], []).append(row)
        return {
            **{name: sum(report[name] for report in reports) for name in ("loaded", "most", "bytes", "most_bytes")},
            "adapters": [
                {
                    "name": version.name,
                    "version": version.key,
                    "current": self._current.get(version.name) is version,
                    "rank": max((row["rank"] for row in found[version.key]), default=0),
                    "loaded": any(row["loaded"] for row in found[version.key]),
                    **{name: sum(row[name] for row in found[version.key]) for name in ("bytes", "running", "requests")},
                }
                for version in versions
            ],
        }

    # -- what the fleet tells of its replicas

    def greet(self, index: int) -> bool:
        """Replica `index` has been built; whether it may take requests already."""
        self._there.add(index)
        self._joining[index] = {version.key for version in self._versions.values() if version.served}
        for version in list(self._versions.values()):
            self._ask(index, version)
        return self._joined(index)

    def heard(self, index: int, message: Message) -> bool:
        """Replica `index` has loaded an adapter or failed to; whether it may take requests from now on, which it might not before.

        Raises the error of a replica that cannot have what the others serve.
        """
        version = self._versions.get(message["key"])
        if version is None:  # dropped meanwhile
            return False
        error = unpack_error(message["error"]) if message["error"] is not None else None
        if error is None and version.digest not in (None, message["digest"]):
            error = InputError(
                f"the files of adapter {version.name!r} are others than those that were loaded before",
                "load it again under its name",
                field="lora",
            )
        version.waiting.discard(index)
        if error is not None:
            named = type(error)(f"replica {index}: {error.problem}", error.fix, field=error.field)
            if version.served and version.gone is None:
                raise named
            version.error = version.error or named
        else:
            version.digest = message["digest"]
            version.loaded.add(index)
        self._joining.get(index, set()).discard(version.key)
        return self._joined(index)

    def left(self, index: int) -> None:
        """Replica `index` is gone, with what it had."""
        self._there.discard(index)
        self._joining.pop(index, None)
        for version in self._versions.values():
            version.waiting.discard(index)
            version.loaded.discard(index)

    def closed(self) -> None:
        """The fleet has stopped."""
        for index in list(self._there):
            self.left(index)

    def tidy(self, used: Callable[[], Collection[str]]) -> None:
        """Drop the versions whose names have gone and that no request has; `used` gives the keys of those that some have."""
        before = time.monotonic() - KEPT_SECONDS
        old = [version for version in self._versions.values() if version.gone is not None and version.gone < before]
        if old:
            busy = used()
            for version in old:
                if version.key not in busy:
                    self._drop(version)

    def _version(self, name: str, path: str) -> Version:
        version = Version(name, f"{name[:180]}/{next(self._numbers)}", path)
        self._versions[version.key] = version
        return version

    def _ask(self, index: int, version: Version) -> None:
        version.waiting.add(index)
        self._send(index, {"op": "load_adapter", "key": version.key, "path": version.path})

    def _drop(self, version: Version) -> None:
        del self._versions[version.key]
        for index in version.loaded | version.waiting:  # whoever is still loading it reads this after
            self._send(index, {"op": "unload_adapter", "key": version.key})

    def _joined(self, index: int) -> bool:
        """Whether it has just got the last that it had to have."""
        if self._joining.get(index):
            return False
        return self._joining.pop(index, None) is not None
