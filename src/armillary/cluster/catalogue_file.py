"""The TOML of the catalogue: what one file may say of devices, links, nodes, racks and a cluster, each figure with its source.

A figure is `{ value = 312e12, source = "datasheet", confirmed = true, note = "" }`, its source a key of the file's `[sources]`;
in a file of one's own a bare value does, and the file is its source. Rates are a second, sizes bytes (`"80 GB"`), latencies ns (`"2us"`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, StringConstraints, ValidationError

from armillary.cluster.device import Dtype, Fabric, Kind, Provenance
from armillary.core.config import Bytes, Config, Duration, load_toml
from armillary.core.errors import FormatError, InputError

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9.-]{0,63}$")]
"""Lower case letters, digits, points and dashes."""

T = TypeVar("T")


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise InputError(f"{value} is no figure", "give a number above 0")
    return value


def _share(value: float) -> float:
    if not 0 < value <= 1:
        raise InputError(f"{value} is no share", "give a number above 0 and at most 1")
    return value


class Source(Config):
    """A datasheet, a paper, a measurement."""

    title: str
    url: str = ""


class Figure(Config, Generic[T]):
    """One value and where it comes from."""

    value: T
    source: str = ""
    confirmed: bool = True
    note: str = ""


def _figure(data: Any) -> Any:
    return data if isinstance(data, Mapping | Figure) else {"value": data}


Rate = Annotated[Figure[Annotated[float, AfterValidator(_positive)]], BeforeValidator(_figure)]
Size = Annotated[Figure[Bytes], BeforeValidator(_figure)]
Share = Annotated[Figure[Annotated[float, AfterValidator(_share)]], BeforeValidator(_figure)]
Delay = Annotated[Figure[Duration], BeforeValidator(_figure)]


class DeviceEntry(Config):
    title: str | None = None
    vendor: str | None = None
    kind: Kind | None = None
    aliases: tuple[Name, ...] = ()
    link: str | None = None
    host_link: str | None = None
    flops: dict[Dtype, Rate] = Field(default_factory=dict)
    memory: Size | None = None
    bandwidth: Rate | None = None
    cache: Size | None = None
    power: Rate | None = None
    idle_power: Rate | None = None
    price: Rate | None = None
    gemm_efficiency: Share | None = None
    memory_efficiency: Share | None = None


class LinkEntry(Config):
    title: str | None = None
    aliases: tuple[Name, ...] = ()
    bandwidth: Rate | None = None
    latency: Delay | None = None


class DiskEntry(Config):
    size: Size
    read: Rate
    write: Rate


class NodeEntry(Config):
    title: str | None = None
    aliases: tuple[Name, ...] = ()
    device: str | None = None
    devices: int | None = None
    fabric: Fabric | None = None
    link: str | None = None
    network: str | None = None
    nics: int = 0
    cpu: str | None = None
    sockets: int = 0
    host_link: str | None = None
    host_memory: Size | None = None
    disk: DiskEntry | None = None
    power: Rate | None = None
    price: Rate | None = None
    source: str = ""
    confirmed: bool = True


class RackEntry(Config):
    title: str | None = None
    aliases: tuple[Name, ...] = ()
    node: str | None = None
    nodes: int | None = None
    fabric: Fabric | None = None
    link: str | None = None
    shape: tuple[int, ...] = ()
    power: Rate | None = None
    price: Rate | None = None
    source: str = ""
    confirmed: bool = True


class ClusterEntry(Config):
    """A cluster: nodes or racks, and the network among them when it is not the node's own."""

    node: str | None = None
    rack: str | None = None
    count: int = 1
    network: str | None = None
    nics: int | None = None


class CatalogueFile(Config):
    """One file."""

    sources: dict[str, Source] = Field(default_factory=dict)
    device: dict[Name, DeviceEntry] = Field(default_factory=dict)
    link: dict[Name, LinkEntry] = Field(default_factory=dict)
    node: dict[Name, NodeEntry] = Field(default_factory=dict)
    rack: dict[Name, RackEntry] = Field(default_factory=dict)
    cluster: ClusterEntry | None = None


Entry = DeviceEntry | LinkEntry | NodeEntry | RackEntry


def read_file(path: Path) -> CatalogueFile:
    """One file, checked by itself; what it names in other files is not looked up. Raises FormatError with the key at fault, NotFoundError."""
    try:
        return CatalogueFile.model_validate(load_toml(path))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, InputError):
            raise FormatError(
                f"{path}: {where}: {cause.problem}" if where else f"{path}: {cause.problem}", cause.fix, field=where
            ) from error
        shown = repr(first["input"])
        shown = shown if len(shown) <= 80 else shown[:80] + "..."
        raise FormatError(
            f"{path}: {where} = {shown} is out of bounds", first["msg"][:1].lower() + first["msg"][1:], field=where
        ) from error


def provenance(figure: Figure[Any], file: CatalogueFile, path: Path, key: str) -> Provenance:
    """Where a figure comes from: the source that it names, else the file. Raises FormatError for a source that the file does not list."""
    if not figure.source:
        return Provenance(f"file {path}", confirmed=figure.confirmed, note=figure.note)
    if figure.source not in file.sources:
        raise FormatError(
            f"{path}: {key} names the source {figure.source!r}, which the file does not list", f"add [sources.{figure.source}]"
        )
    source = file.sources[figure.source]
    return Provenance(source.title, source.url, figure.confirmed, figure.note)
