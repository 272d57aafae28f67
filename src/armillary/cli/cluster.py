"""`armillary cluster`: the catalogue of devices, links, nodes and racks, and what a cluster's spelling means."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.cluster.catalogue import Catalogue
    from armillary.cluster.cluster import Cluster
    from armillary.cluster.device import Device, Link, Node, Provenance, Rack

cluster = App(name="cluster")

Files = Annotated[
    tuple[Path, ...], Parameter(name="--catalogue", help="TOML files to read besides ~/.config/armillary/cluster (docs/cluster.md).")
]
_MARK = "unconfirmed: "


@cluster.default
@cluster.command(name="list")
def list_entries(*, catalogue: Files = (), json: Json = False) -> None:
    """Every device, node, rack and link that has a name."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.units import format_bytes, format_duration, format_rate

    known = _catalogue(catalogue)
    if json:
        tables: dict[str, Mapping[str, Any]] = {
            "devices": known.devices, "nodes": known.nodes, "racks": known.racks, "links": known.links,
        }  # fmt: skip
        print_json({kind: {name: _facts(entry) for name, entry in entries.items()} for kind, entries in tables.items()})
        return
    aliases: dict[str, list[str]] = {}
    for alias, name in known.aliases.items():
        aliases.setdefault(name, []).append(alias)

    def named(name: str) -> str:
        return f"{name} ({', '.join(aliases[name])})" if name in aliases else name

    table(
        ("device", "peak, 16 bits (or fp32)", "memory", "bandwidth", "power", "price", "what it is"),
        [
            (
                named(name),
                format_rate(_peak(device), "FLOP"),
                format_bytes(device.memory),
                format_rate(device.bandwidth),
                _watts(device.power),
                _dollars(device.price),
                device.title,
            )
            for name, device in known.devices.items()
        ],
    )
    print()
    table(
        ("node or rack", "devices", "by", "network", "price", "what it is"),
        [
            (
                named(name),
                f"{node.devices} x {node.device.name}",
                f"{node.link.name} ({node.fabric})" if node.link is not None else "",
                f"{node.nics} x {node.network.name}" if node.network is not None else "",
                _dollars(node.hourly_price),
                node.title,
            )
            for name, node in known.nodes.items()
        ]
        + [
            (
                named(name),
                f"{rack.devices} x {rack.node.device.name}",
                f"{rack.link.name} ({rack.fabric})",
                "",
                _dollars(rack.hourly_price),
                rack.title,
            )
            for name, rack in known.racks.items()
        ],
    )
    print()
    table(
        ("link", "each way and device", "latency", "what it is"),
        [(named(name), format_rate(link.bandwidth), format_duration(link.latency), link.title) for name, link in known.links.items()],
    )
    print("\narmillary cluster show NAME tells where each figure comes from, and which are not confirmed.")


@cluster.command(name="show")
def show(
    name: Annotated[str, Parameter(help="A name of the list, a cluster (8xh100, dgx-h100:16, h100x8:16/roce-400) or a TOML cluster file.")],
    /,
    *,
    catalogue: Files = (),
    json: Json = False,
) -> None:
    """One entry or cluster: every figure with its unit and its source."""
    from armillary.cli.terminal import print_json, table
    from armillary.cluster.cluster import cluster as spelled

    known = _catalogue(catalogue)
    entry = known.lookup(name)
    made = spelled(name, known) if entry is None else None
    entries = [entry] if entry is not None else _parts(made)
    if json:
        print_json(({"cluster": _sums(made)} if made is not None else {}) | {each.name: _facts(each) for each in entries})
        return
    if made is not None:
        table(("", ""), list(_sums(made).items()), title=made.name)
        print()
    doubted = 0
    for each in entries:
        rows = _rows(each)
        doubted += sum(row[2].startswith(_MARK) for row in rows)
        table(("figure", "value", "source"), rows, title=f"{each.name}: {each.title}")
        print()
    if doubted:
        print(
            f"{doubted} figure{'s are' if doubted != 1 else ' is'} unconfirmed: not found in a source that could be read. Check before relying on it."
        )


def _catalogue(files: tuple[Path, ...]) -> Catalogue:
    from armillary.cluster.catalogue import load, user_folder

    return load(files, folder=user_folder())


def _parts(made: Cluster | None) -> list[Any]:
    """What a cluster is made of, each entry once."""
    if made is None:
        return []
    node = made.node
    parts = [made.rack, node, node.device, made.domain_link, node.network, node.host_link, node.cpu]
    return list({part.name: part for part in parts if part is not None}.values())


def _sums(made: Cluster) -> dict[str, str]:
    from armillary.core.units import format_bytes, format_rate

    link, network = made.domain_link, made.network
    known = {
        "devices": f"{made.devices:,} x {made.device.name} in {made.nodes:,} node{'s' if made.nodes != 1 else ''} ({made.node.title})",
        "memory": format_bytes(made.memory),
        "domain": f"{made.domain} devices by {link.name}, {format_rate(link.bandwidth)} each" if link is not None else None,
        "network": f"{made.node.nics} x {network.name} a node, {format_rate(made.network_per_device)} a device" if network else None,
        "power": _watts(made.power),
        "price": _dollars(made.hourly_price),
    }
    return {key: value for key, value in known.items() if value}


def _rows(entry: Device | Link | Node | Rack) -> list[tuple[str, str, str]]:
    """(figure, value with its unit, source), and the names of what an entry is made of."""
    rows = []
    for key, value in _values(entry).items():
        where = entry.provenance.get(key)
        rows.append((key.replace(".", " ").replace("_", " "), value, "" if where is None else _source(where)))
    if "shape" in entry.provenance and not getattr(entry, "shape", ()):
        rows.append(("shape", "", _source(entry.provenance["shape"])))
    return rows


def _values(entry: Device | Link | Node | Rack) -> dict[str, str]:
    from dataclasses import fields

    from armillary.core.units import format_bytes, format_duration, format_rate

    said: dict[str, str] = {}
    for field in fields(entry):
        value = getattr(entry, field.name)
        if value in (None, 0, (), "") or field.name in ("name", "title", "provenance"):
            continue
        match field.name:
            case "flops":
                said |= {f"flops.{dtype}": format_rate(rate, "FLOP") for dtype, rate in value.items()}
            case "bandwidth":
                said["bandwidth"] = format_rate(value)
            case "memory" | "cache" | "host_memory":
                said[field.name] = format_bytes(value)
            case "power" | "idle_power":
                said[field.name] = _watts(value)
            case "price":
                said["price"] = _dollars(value)
            case "latency":
                said["latency"] = format_duration(value)
            case "disk":
                said |= {
                    "disk.size": format_bytes(value.size),
                    "disk.read": format_rate(value.read),
                    "disk.write": format_rate(value.write),
                }
            case "gemm_efficiency" | "memory_efficiency":
                said[field.name] = f"{value:.1%}"
            case "shape":
                said["shape"] = " x ".join(map(str, value))
            case _:
                said[field.name] = getattr(value, "name", None) or str(value)
    return said


def _facts(entry: Device | Link | Node | Rack) -> dict[str, Any]:
    """An entry for machines: plain numbers, and where each comes from."""
    from dataclasses import asdict, fields

    facts: dict[str, Any] = {}
    for field in fields(entry):
        value = getattr(entry, field.name)
        facts[field.name] = getattr(value, "name", value)
    facts["provenance"] = {key: asdict(where) for key, where in entry.provenance.items()}
    if getattr(entry, "disk", None) is not None:
        facts["disk"] = asdict(entry.disk)  # type: ignore[union-attr,arg-type]
    return facts


def _source(where: Provenance) -> str:
    note = f" ({where.note})" if where.note else ""
    return ("" if where.confirmed else _MARK) + where.source + note


def _peak(device: Device) -> float:
    """In the widest 16-bit type, else in fp32, else in whatever there is."""
    return next((device.flops[dtype] for dtype in ("bf16", "fp16", "fp32") if dtype in device.flops), max(device.flops.values()))


def _watts(value: float | None) -> str:
    from armillary.core.units import format_count

    return "" if value is None else f"{format_count(value)} W" if value < 10_000 else f"{format_count(value / 1000)} kW"


def _dollars(value: float | None) -> str:
    return "" if value is None else f"${value:,.2f}/h"
