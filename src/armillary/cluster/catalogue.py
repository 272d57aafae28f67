"""The catalogue of devices, links, nodes and racks by name: what is packaged here, and what files of one's own add or change.

`device("a100-80g-sxm")`, `link("nvlink-4")`, `node("dgx-h100")`, `rack("gb200-nvl72")` look into the packaged catalogue and the files
in the user's folder; `load([...])` reads more files. A file may add entries and change figures of those that are there.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, TypeVar

from armillary.cluster.catalogue_file import CatalogueFile, Entry, Figure, NodeEntry, RackEntry, provenance, read_file
from armillary.cluster.device import Device, Disk, Link, Node, Provenance, Rack
from armillary.core.errors import FormatError, InputError, NotFoundError

PACKAGED: Final = Path(__file__).parent / "catalogue"
MOST_FILES: Final = 256
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Everything that has a name. `aliases` maps shorter names to those; a name is of one kind only."""

    devices: Mapping[str, Device]
    links: Mapping[str, Link]
    nodes: Mapping[str, Node]
    racks: Mapping[str, Rack]
    aliases: Mapping[str, str]

    def device(self, name: str) -> Device:
        """Raises NotFoundError with the closest names; so do the other three."""
        return self._get(self.devices, name, "device")

    def link(self, name: str) -> Link:
        return self._get(self.links, name, "link")

    def node(self, name: str) -> Node:
        return self._get(self.nodes, name, "node")

    def rack(self, name: str) -> Rack:
        return self._get(self.racks, name, "rack")

    def find(self, name: str) -> Device | Link | Node | Rack:
        """Whatever has this name, by whatever case. Raises NotFoundError with the closest names."""
        found = self.lookup(name)
        if found is None:
            raise self.unknown(name, "entry", [*self.devices, *self.nodes, *self.racks, *self.links, *self.aliases])
        return found

    def lookup(self, name: str) -> Device | Link | Node | Rack | None:
        """Whatever has this name, or None."""
        key = self._key(name)
        for table in (self.devices, self.nodes, self.racks, self.links):
            if key in table:
                return table[key]
        return None

    def _get(self, table: Mapping[str, T], name: str, kind: str) -> T:
        key = self._key(name)
        if key not in table:
            raise self.unknown(name, kind, [*table, *(alias for alias, of in self.aliases.items() if of in table)])
        return table[key]

    def _key(self, name: str) -> str:
        name = name.strip().lower()
        return self.aliases.get(name, name)

    @staticmethod
    def unknown(name: str, kind: str, known: Iterable[str]) -> NotFoundError:
        """The error for a name that nothing has: its closest ones."""
        names = list(known)
        close = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
        fix = f"did you mean {' or '.join(close)}?" if close else "see `armillary cluster list`, or add it in a TOML file (docs/cluster.md)"
        return NotFoundError(f"the catalogue has no {kind} called {name[:80]!r}", fix, field="kv_link" if kind == "link" else "cluster")


def user_folder(environment: Mapping[str, str] | None = None) -> Path:
    """Where a user's own files lie: `XDG_CONFIG_HOME/armillary/cluster`, else `~/.config/armillary/cluster`."""
    environment = os.environ if environment is None else environment
    base = environment.get("XDG_CONFIG_HOME", "")
    return (Path(base) if base and Path(base).is_absolute() else Path.home() / ".config") / "armillary" / "cluster"


def load(files: Iterable[str | Path] = (), folder: Path | None = None) -> Catalogue:
    """The packaged catalogue, then every `*.toml` of `folder` (none for None), then `files`; later ones win, figure by figure.

    Raises NotFoundError, FormatError (the file and the key at fault), InputError (an entry that names what does not exist).
    """
    own = sorted(folder.glob("*.toml")) if folder is not None and folder.is_dir() else []
    own += [Path(file) for file in files]
    if len(own) > MOST_FILES:
        raise InputError(f"{len(own)} catalogue files are more than {MOST_FILES}", "join some of them")
    drafts: dict[str, dict[str, _Draft]] = {"device": {}, "link": {}, "node": {}, "rack": {}}
    for path, file in (*_packaged(), *((path, read_file(path)) for path in own)):
        for kind, table in drafts.items():
            for name, entry in getattr(file, kind).items():
                table.setdefault(name, _Draft(f"{kind}.{name}", path)).merge(entry, file, path)
    return _build(drafts)


@lru_cache(maxsize=1)
def _packaged() -> tuple[tuple[Path, CatalogueFile], ...]:
    return tuple((path, read_file(path)) for path in sorted(PACKAGED.glob("*.toml")))


@lru_cache(maxsize=1)
def default() -> Catalogue:
    """The packaged catalogue with the user's folder, read once a process."""
    return load(folder=user_folder())


def device(name: str) -> Device:
    """A device of the default catalogue. Raises NotFoundError with the closest names."""
    return default().device(name)


def link(name: str) -> Link:
    """A link of the default catalogue, likewise."""
    return default().link(name)


def node(name: str) -> Node:
    """A node of the default catalogue, likewise."""
    return default().node(name)


def rack(name: str) -> Rack:
    """A rack of the default catalogue, likewise."""
    return default().rack(name)


@dataclass(slots=True)
class _Draft:
    """An entry while files are read: its values so far, and the provenance of its figures by dotted key."""

    key: str
    path: Path  # the file that last said something of it
    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, Provenance] = field(default_factory=dict)

    def merge(self, entry: Entry, file: CatalogueFile, path: Path) -> None:
        self.path = path
        for name in entry.model_fields_set:
            value = getattr(entry, name)
            if isinstance(value, Mapping):
                self.values[name] = self.values.get(name, {}) | {key: self._take(f"{name}.{key}", v, file) for key, v in value.items()}
            elif name == "disk":
                self.values[name] = {key: self._take(f"disk.{key}", getattr(value, key), file) for key in ("size", "read", "write")}
            elif name not in ("source", "confirmed"):
                self.values[name] = self._take(name, value, file)
        if isinstance(entry, NodeEntry | RackEntry):  # of the shape: which devices, how many, how joined
            shape = Figure[str](value="", source=entry.source, confirmed=entry.confirmed)
            self.origins["shape"] = provenance(shape, file, path, self.key)

    def _take(self, name: str, value: Any, file: CatalogueFile) -> Any:
        if not isinstance(value, Figure):
            return value
        self.origins[name] = provenance(value, file, self.path, f"{self.key}.{name}")
        return value.value

    def need(self, *names: str) -> None:
        missing = [name for name in names if self.values.get(name) in (None, {})]
        if missing:
            raise FormatError(f"{self.path}: {self.key} lacks {', '.join(missing)}", "give each of them: docs/cluster.md shows an entry")

    def get(self, name: str) -> Any:
        return self.values.get(name)

    def count(self, name: str, most: int = 1_000_000) -> int:
        value = self.values.get(name) or 0
        if not 0 <= value <= most:
            raise FormatError(f"{self.path}: {self.key}.{name} is {value}", f"give between 0 and {most:,}")
        return value


def _build(drafts: Mapping[str, Mapping[str, _Draft]]) -> Catalogue:
    aliases = dict(_aliases(drafts))
    links = {name: _link(name, draft) for name, draft in drafts["link"].items()}
    devices = {name: _device(name, draft) for name, draft in drafts["device"].items()}
    part = Catalogue(devices, links, {}, {}, aliases)
    for name, each in devices.items():
        for end in (each.link, each.host_link):
            _named(drafts["device"][name], lambda end=end: end and part.link(end))
    nodes = {name: _node(name, draft, part) for name, draft in drafts["node"].items()}
    part = Catalogue(devices, links, nodes, {}, aliases)
    racks = {name: _rack(name, draft, part) for name, draft in drafts["rack"].items()}
    return Catalogue(devices, links, nodes, racks, aliases)


def _aliases(drafts: Mapping[str, Mapping[str, _Draft]]) -> Iterator[tuple[str, str]]:
    seen: dict[str, _Draft] = {}
    for table in drafts.values():
        for name, draft in table.items():
            for word in (name, *dict.fromkeys(draft.get("aliases") or ())):
                if word in seen:
                    raise FormatError(f"{draft.path}: {draft.key} takes the name {word!r} of {seen[word].key}", "choose another name")
                seen[word] = draft
                if word != name:
                    yield word, name


def _link(name: str, draft: _Draft) -> Link:
    draft.need("title", "bandwidth", "latency")
    return Link(name, draft.get("title"), draft.get("bandwidth"), draft.get("latency"), draft.origins)


def _device(name: str, draft: _Draft) -> Device:
    draft.need("title", "vendor", "kind", "flops", "memory", "bandwidth")
    values = {key: value for key, value in draft.values.items() if key != "aliases"}
    return Device(name, **values, provenance=draft.origins)


def _node(name: str, draft: _Draft, known: Catalogue) -> Node:
    draft.need("title", "device", "devices", "fabric")
    ends = {key: _named(draft, lambda key=key: known.link(draft.get(key))) for key in ("link", "network", "host_link") if draft.get(key)}
    devices, nics = draft.count("devices"), draft.count("nics")
    if devices > 1 and draft.get("fabric") != "none" and "link" not in ends:
        raise FormatError(f"{draft.path}: {draft.key} joins {devices} devices by a {draft.get('fabric')} of no link", "give `link`")
    if ("network" in ends) != (nics > 0):
        raise FormatError(f"{draft.path}: {draft.key} needs both `network` and `nics`, or neither", "give both")
    return Node(
        name,
        draft.get("title"),
        _named(draft, lambda: known.device(draft.get("device"))),
        devices,
        draft.get("fabric"),
        ends.get("link"),
        ends.get("network"),
        nics,
        _named(draft, lambda: known.device(draft.get("cpu"))) if draft.get("cpu") else None,
        draft.count("sockets"),
        draft.get("host_memory"),
        ends.get("host_link"),
        Disk(**draft.get("disk")) if draft.get("disk") else None,
        draft.get("power"),
        draft.get("price"),
        draft.origins,
    )


def _rack(name: str, draft: _Draft, known: Catalogue) -> Rack:
    draft.need("title", "node", "nodes", "fabric", "link")
    rack = Rack(
        name,
        draft.get("title"),
        _named(draft, lambda: known.node(draft.get("node"))),
        draft.count("nodes"),
        draft.get("fabric"),
        _named(draft, lambda: known.link(draft.get("link"))),
        tuple(draft.get("shape") or ()),
        draft.get("power"),
        draft.get("price"),
        draft.origins,
    )
    size = 1
    for side in rack.shape:
        size *= side
    if (rack.fabric == "torus" or rack.shape) and size != rack.devices:
        shown = " x ".join(map(str, rack.shape)) or "no shape"
        raise FormatError(f"{draft.path}: {draft.key} has {rack.devices} devices on a torus of {shown}", "make `shape` multiply to them")
    return rack


def _named(draft: _Draft, look_up: Any) -> Any:
    """What an entry names; the error also says which file and entry name it."""
    try:
        return look_up()
    except NotFoundError as error:
        raise FormatError(f"{draft.path}: {draft.key}: {error.problem}", error.fix) from error
