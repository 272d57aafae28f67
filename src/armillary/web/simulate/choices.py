"""What the page offers to choose from: what has a name here."""

from __future__ import annotations

from functools import cache
from typing import Any

from armillary.cluster import catalogue
from armillary.cluster.device import Node, Rack
from armillary.models.graph.parameters import parameters
from armillary.models.graph.published import published
from armillary.serve import policies
from armillary.serve.policies import orders, routing
from armillary.serve.workload.lengths import names as lengths
from armillary.web.simulate.body import facts
from armillary.web.simulate.processes import SECONDS


@cache
def choices() -> dict[str, Any]:
    """Names, with a few words each where a name says little."""
    known = catalogue.default()
    short = {name: alias for alias, name in reversed(list(known.aliases.items()))}
    devices = [{"name": short.get(name, name), "title": one.title, "devices": 1, "price": one.price} for name, one in known.devices.items()]
    shapes: list[Node | Rack] = [*known.nodes.values(), *known.racks.values()]
    nodes = [{"name": one.name, "title": one.title, "devices": one.devices, "price": one.hourly_price} for one in shapes]
    return {
        "models": [{"name": name, "parameters": parameters(one.architecture)} for name, one in published().items()],
        "clusters": [*devices, *nodes],
        "routers": list(routing.names()),
        "policies": list(policies.names()),
        "orders": list(orders.NAMES),
        "lengths": list(lengths()),
        "bounds": facts() | {"seconds": SECONDS},
    }
