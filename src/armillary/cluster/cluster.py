"""A cluster: nodes or racks of one kind, and how it is written: `h100`, `8xh100`, `dgx-h100:16`, `h100x8:16/roce-400`, a file."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from armillary.cluster import catalogue as catalogues
from armillary.cluster import profile
from armillary.cluster.catalogue import Catalogue
from armillary.cluster.catalogue_file import read_file
from armillary.cluster.device import Device, Fabric, Link, Node, Rack
from armillary.core.errors import FormatError, InputError, NotFoundError

MOST_NODES: Final = 1_000_000
MOST_DEVICES: Final = 1024  # of one node
SPELLING: Final = (
    "write a device (h100), so many in a node (8xh100), a node or rack (dgx-h100:16), a network (h100x8:16/roce-400), "
    "or a file (TOML, or a profile.json)"
)
_FORM: Final = re.compile(r"(?P<shape>[^:/]+)(?::(?P<nodes>[0-9]{1,9}))?(?:/(?P<network>[^:/]+))?")
_BEFORE: Final = re.compile(r"([0-9]{1,6})x(.+)")
_AFTER: Final = re.compile(r"(.+)x([0-9]{1,6})")
_FABRICS: Final[dict[str, Fabric]] = {"nvlink": "switch", "pcie": "pcie", "xgmi": "mesh"}
"""How devices meet in a node that no entry describes, by the family of their link."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` servers; with `rack`, they stand in racks that are one fast domain each."""

    name: str
    node: Node
    nodes: int = 1
    rack: Rack | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.nodes <= MOST_NODES:
            raise InputError(f"a cluster of {self.nodes} nodes", f"give between 1 and {MOST_NODES:,}")
        if self.nodes > self.domain_nodes and self.node.network is None:
            raise InputError(
                f"{self.name}: {self.node.name} has no network, and {self.nodes} of them need one",
                f"name it, such as {self.name}/ib-ndr; see `armillary cluster list`",
            )

    @property
    def device(self) -> Device:
        return self.node.device

    @property
    def devices(self) -> int:
        return self.node.devices * self.nodes

    @property
    def domain_nodes(self) -> int:
        """Nodes that share one fast fabric."""
        return 1 if self.rack is None else self.rack.nodes

    @property
    def domain(self) -> int:
        """Devices that share one fast fabric: a node's, or a rack's."""
        return self.node.devices * self.domain_nodes

    @property
    def domain_link(self) -> Link | None:
        """The link within a domain; None for single devices."""
        return self.node.link if self.rack is None else self.rack.link

    @property
    def network(self) -> Link | None:
        """One network card's link among nodes."""
        return self.node.network

    @property
    def network_per_device(self) -> float:
        """B/s among nodes that each device has when all send."""
        return self.node.network_bandwidth / self.node.devices

    @property
    def memory(self) -> int:
        """Bytes of all devices."""
        return self.device.memory * self.devices

    @property
    def hourly_price(self) -> float | None:
        """$/hour, or None where no price is known."""
        if self.rack is not None and self.rack.price is not None:
            return self.rack.price * self.nodes / self.rack.nodes
        each = self.node.hourly_price
        return None if each is None else each * self.nodes

    @property
    def power(self) -> float | None:
        """W at full load: the racks' or nodes' own figures, else the devices' alone."""
        if self.rack is not None and self.rack.power is not None:
            return self.rack.power * self.nodes / self.rack.nodes
        if self.node.power is not None:
            return self.node.power * self.nodes
        return None if self.device.power is None else self.device.power * self.devices


def cluster(text: str, catalogue: Catalogue | None = None) -> Cluster:
    """The cluster that `text` spells, or that the TOML file of that path describes, or the machine whose profile (.json) it is.

    `[COUNTx]NAME[xCOUNT][:NODES][/NETWORK]`: NAME is a device, a node or a rack of the catalogue; NODES counts nodes (racks for a rack);
    NETWORK is a link, one card a device unless the node has its own number. COUNT devices of a node that the catalogue describes are
    that node, or their share of it; of a profile COUNT parts of one machine. Raises NotFoundError with the closest names, InputError, FormatError (a file).
    """
    catalogue = catalogues.default() if catalogue is None else catalogue
    if text.endswith(".toml"):
        return _from_file(Path(text))
    if (machine := profile.spelled(text)) is not None:
        path, parts = machine
        return Cluster(path.stem if parts == 1 else f"{parts}x{path.stem}", profile.load(path).node(parts=parts))
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InputError(f"{text[:80]!r} spells no cluster", SPELLING, field="cluster")
    nodes = 1 if match["nodes"] is None else int(match["nodes"])
    network = None if match["network"] is None else catalogue.link(match["network"])
    return _assemble(text.strip(), _shape(match["shape"], catalogue), nodes, network, None)


def _assemble(name: str, shape: Node | Rack, count: int, network: Link | None, nics: int | None) -> Cluster:
    node = shape.node if isinstance(shape, Rack) else shape
    if network is not None:
        node = replace(node, network=network, nics=nics or node.nics or node.devices)
    elif nics is not None:
        node = replace(node, nics=nics)
    if isinstance(shape, Rack):
        return Cluster(name, node, count * shape.nodes, replace(shape, node=node))
    return Cluster(name, node, count)


def _shape(text: str, catalogue: Catalogue) -> Node | Rack:
    """A node or a rack from `dgx-h100`, `h100`, `8xh100` or `h100x8`. A name of the catalogue goes before a count in it."""
    found = catalogue.lookup(text)
    if found is None:
        for form, number, name in ((_BEFORE, 1, 2), (_AFTER, 2, 1)):
            match = form.fullmatch(text.strip().lower())
            if match is not None and isinstance(device := catalogue.lookup(match[name]), Device):
                return _node_of(device, int(match[number]), catalogue)
            if match is not None and isinstance(device, Node | Rack):
                raise InputError(
                    f"{text!r} counts the devices of {device.name}, whose number is fixed", f"write {device.name}:{match[number]}"
                )
        bare = re.sub(r"^[0-9]+x|x[0-9]+$", "", text.strip().lower())
        raise catalogue.unknown(bare, "device, node or rack", [*catalogue.devices, *catalogue.nodes, *catalogue.racks, *catalogue.aliases])
    if isinstance(found, Link):
        raise InputError(f"{text!r} is a link and no hardware to compute on", "write a link after a slash: h100x8:2/ib-ndr")
    return _node_of(found, 1, catalogue) if isinstance(found, Device) else found


def _node_of(device: Device, count: int, catalogue: Catalogue) -> Node:
    """`count` devices in one node: the catalogue's node of as many, a share of its smallest larger one, else as their link joins them."""
    if not 1 <= count <= MOST_DEVICES:
        raise InputError(f"a node of {count} devices", f"give between 1 and {MOST_DEVICES}, and more nodes, such as {device.name}x8:16")
    known = [node for node in catalogue.nodes.values() if node.device.name == device.name and node.devices >= count]
    if known and count > 1:
        whole = min(known, key=lambda node: node.devices)
        if whole.devices == count:
            return whole
        return replace(
            whole,
            name=f"{count}x{device.name}",
            title=f"{count} of the {whole.devices} devices of {whole.name}",
            devices=count,
            nics=max(1, whole.nics * count // whole.devices) if whole.nics else 0,
            power=None,
            price=None if whole.price is None else whole.price * count / whole.devices,
        )
    host = None if device.host_link is None else catalogue.link(device.host_link)
    if count == 1:
        return Node(device.name, device.title, device, 1, "none", None, host_link=host)
    fabric = None if device.link is None else _FABRICS.get(device.link.partition("-")[0])
    if device.link is None or fabric is None:
        known_nodes = [name for name, node in catalogue.nodes.items() if node.device.name == device.name]
        known_nodes += [name for name, rack in catalogue.racks.items() if rack.node.device.name == device.name]
        fix = f"name a shape ({', '.join(known_nodes)})" if known_nodes else "describe a node in a TOML file (docs/cluster.md)"
        raise InputError(f"the catalogue does not say how {count} x {device.name} are joined in one node", fix)
    title = f"{count} x {device.title}"
    return Node(f"{count}x{device.name}", title, device, count, fabric, catalogue.link(device.link), host_link=host)


def _from_file(path: Path) -> Cluster:
    """A cluster file: a catalogue file with a [cluster] table of node or rack, count, network, nics."""
    catalogue = catalogues.load([path], folder=catalogues.user_folder())
    entry = read_file(path).cluster
    if entry is None or (entry.node is None) == (entry.rack is None):
        raise FormatError(f"{path} has no [cluster] table with a node or a rack", "add [cluster], node = NAME (or rack = NAME), count = 16")
    try:
        shape = catalogue.rack(entry.rack) if entry.rack is not None else _shape(entry.node or "", catalogue)
        network = None if entry.network is None else catalogue.link(entry.network)
    except NotFoundError as error:
        raise FormatError(f"{path}: cluster: {error.problem}", error.fix) from error
    if entry.nics is not None and not 1 <= entry.nics <= MOST_DEVICES:
        raise FormatError(f"{path}: cluster.nics is {entry.nics}", f"give between 1 and {MOST_DEVICES}")
    return _assemble(path.stem, shape, entry.count, network, entry.nics)
