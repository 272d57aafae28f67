"""Which adapters there are, which version of each, and whose weights are in memory: many fine-tuned models beside one base (S-LoRA, Sheng et al. 2023)."""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import CapacityError, InputError, NotFoundError
from armillary.models.config import ModelConfig
from armillary.models.file_stamp import FileStamp
from armillary.models.lora import Adapter, read_lora
from armillary.models.lora_config import check_name
from armillary.serve.executors.forward import PackedAdapter, TakesAdapters

MAX_NAMES: Final = 10_000


@dataclass(slots=True, eq=False)
class Version:
    """An adapter as its files were when it was loaded.

    Requests carry `key`. Another version of the same name has another one, so that running requests keep the weights that they
    began with and no prefix that one version computed is taken for another's.
    """

    name: str
    key: str
    path: Path
    files: tuple[FileStamp, ...]
    rank: int
    packed: PackedAdapter | None = None  # in memory
    users: int = 0  # requests that have not ended
    requests: int = 0  # that ever asked for it
    used_at: int = field(default=0)  # in the store's own count


class AdapterStore:
    """Adapters by name, at most `max_loaded` of them and `max_bytes` bytes in memory at once.

    The least recently used one leaves when another needs the room and is read again when it is asked for; one that a request
    uses never leaves. Loading takes its time on the caller's thread; everything else is quick, from any thread.
    """

    def __init__(self, forward: TakesAdapters, config: ModelConfig, *, max_loaded: int, max_bytes: int) -> None:
        self._pack: Callable[[Adapter], PackedAdapter] = lambda adapter: forward.pack_adapter(adapter.layers)
        self._config = config
        self.max_loaded, self.max_bytes = max_loaded, max_bytes
        self._current: dict[str, Version] = {}  # by name
        self._versions: dict[str, Version] = {}  # by key: the current ones, and others as long as they are used
        self._numbers, self._clock = itertools.count(1), itertools.count(1)
        self._loading = threading.Lock()  # one at a time, so that no more is read than there is room for
        self._books = threading.Lock()  # held for moments; nothing else is waited for under it

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._current)

    def __contains__(self, name: str) -> bool:
        return name in self._current

    def load(self, name: str, path: str | Path) -> Version:
        """Serve the peft folder at `path` as `name`. A name that is taken gets new weights; requests that run keep theirs.

        Raises as `read_lora`; InputError for a bad name, CapacityError when all that is in memory is in use.
        """
        check_name(name)
        with self._loading:
            old = self._current.get(name)
            if old is None and len(self._current) >= MAX_NAMES:
                raise CapacityError(f"there are {MAX_NAMES:,} adapters already", "unload one first")
            path = Path(path).absolute()
            adapter = read_lora(path, self._config, self.max_bytes)
            version = Version(name, f"{name}#{next(self._numbers)}", path, adapter.files, adapter.rank)
            self._place(version, adapter, old)
            with self._books:
                self._current[name] = self._versions[version.key] = version
                if old is not None:
                    self._forget_unused(old)
            return version

    def unload(self, name: str) -> None:
        """`name` is served no longer; requests that run go on. Raises NotFoundError, with the closest name."""
        with self._books:
            version = self._current.pop(name, None)
            if version is None:
                raise unknown(name, self.names, "lora_name")
            self._forget_unused(version)

    def is_ready(self, name: str) -> bool:
        """Whether `key` would answer at once."""
        version = self._current.get(name)
        return version is None or version.packed is not None

    def key(self, name: str) -> str:
        """What a request for `name` carries, which is counted. Reads the weights as `prepare` does."""
        version = self.prepare(name)
        version.requests += 1
        return version.key

    def prepare(self, name: str) -> Version:
        """Reads the weights again when they have left the memory.

        Raises NotFoundError with the closest name, InputError when the files are others than those that were loaded, and CapacityError
        as `load` does.
        """
        version = self._current.get(name)
        if version is None:
            raise unknown(name, self.names)
        if version.packed is None:
            with self._loading:
                if version.packed is None:
                    adapter = read_lora(version.path, self._config, self.max_bytes)
                    if adapter.files != version.files:
                        raise InputError(
                            f"the files of adapter {name!r} have changed since it was loaded", "load it again under its name", field="model"
                        )
                    self._place(version, adapter, None)
        version.used_at = next(self._clock)
        return version

    # What the engine and its executor do with keys

    def begin(self, key: str) -> None:
        """A request with `key` begins. Raises CapacityError when its weights have just left the memory."""
        with self._books:
            version = self._versions.get(key)
            if version is None or version.packed is None:
                raise CapacityError(f"adapter {key.rpartition('#')[0]!r} has just left the memory", "send the request again")
            version.users += 1

    def end(self, key: str) -> None:
        """A request that had begun has ended."""
        with self._books:
            version = self._versions[key]
            version.users -= 1
            if self._current.get(version.name) is not version:
                self._forget_unused(version)

    def packed(self, key: str) -> PackedAdapter | None:
        """The weights for a batch; None when they are not in memory, which happens to no request that has not ended."""
        version = self._versions.get(key)
        return version.packed if version is not None else None

    def state(self) -> dict[str, Any]:
        """Plain values for the page and the metrics; none while there are no adapters."""
        with self._books:
            versions = list(self._versions.values())
            if not versions:
                return {}
            return {
                "loaded": sum(version.packed is not None for version in versions),
                "most": self.max_loaded,
                "bytes": self._bytes(),
                "most_bytes": self.max_bytes,
                "adapters": [
                    {
                        "name": version.name,
                        "version": version.key,
                        "current": self._current.get(version.name) is version,
                        "rank": version.rank,
                        "bytes": version.packed.nbytes if version.packed is not None else 0,
                        "loaded": version.packed is not None,
                        "running": version.users,
                        "requests": version.requests,
                    }
                    for version in versions
                ],
            }

    # Memory

    def _place(self, version: Version, adapter: Adapter, replaced: Version | None) -> None:
        """Packs an adapter and makes room for it, `replaced` being the first to go."""
        packed = self._pack(adapter)
        with self._books:
            loaded = [one for one in self._versions.values() if one.packed is not None]
            leaving = sorted((one for one in loaded if not one.users), key=lambda one: (one is not replaced, one.used_at))
            count, size = len(loaded), self._bytes()
            gone = 0
            while count + 1 > self.max_loaded or size + packed.nbytes > self.max_bytes:
                if gone == len(leaving):
                    raise CapacityError(
                        f"{count} adapters in use take {size:,} bytes; with {version.name!r} ({packed.nbytes:,} bytes) there would be more than "
                        f"{self.max_loaded} adapters or {self.max_bytes:,} bytes",
                        "retry when requests have ended, or serve with a larger --max-loras or --lora-memory",
                    )
                count, size = count - 1, size - leaving[gone].packed.nbytes  # type: ignore[union-attr]
                gone += 1
            for one in leaving[:gone]:
                one.packed = None
            version.packed = packed
            version.used_at = next(self._clock)

    def _bytes(self) -> int:
        return sum(version.packed.nbytes for version in self._versions.values() if version.packed is not None)

    def _forget_unused(self, version: Version) -> None:
        """A version that no name stands for goes when nobody uses it."""
        if not version.users:
            version.packed = None
            self._versions.pop(version.key, None)


def unknown(name: str, known: tuple[str, ...], field: str = "model") -> NotFoundError:
    """The error for a model that is not served, with the closest names."""
    close = difflib.get_close_matches(name[:200], known, n=3, cutoff=0.5)
    hint = (
        f"did you mean {' or '.join(map(repr, close))}?"
        if close
        else f"ask for {', '.join(map(repr, known[:3]))}"
        if known
        else "load it first"
    )
    return NotFoundError(f"model {name[:200]!r} is not served here", hint, field=field)
