"""What is rented for replicas: bare devices one by one, named nodes and racks whole."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from armillary.cluster.cluster import Cluster

Group = tuple[int, int]
"""How many engines, and how many devices each has."""


@dataclass(frozen=True, slots=True)
class Rent:
    """`devices` are had together for `price` $/hour (None: not known)."""

    devices: int
    price: float | None

    def packages(self, *groups: Group) -> int:
        """How many times that is taken: an engine of no more devices lies within one, a larger one takes several and leaves the rest of the last.

        Engines are put where least is left, the largest first (best fit, decreasing): the fewest there are where sizes divide each other, as
        powers of two do.
        """
        taken, free = 0, Counter[int]()  # packages by the devices that are left in them
        for count, size in sorted(groups, key=lambda group: -group[1]):
            for left in sorted(left for left, there in free.items() if there and left >= size):
                each = left // size
                used = min(free[left], math.ceil(count / each))
                placed = min(count, used * each)
                free[left] -= used
                whole, rest = divmod(placed, each)
                free[left - each * size] += whole
                if rest:
                    free[left - rest * size] += 1
                count -= placed
            if not count:
                continue
            if size > self.devices:
                several = math.ceil(size / self.devices)
                taken += count * several
                free[several * self.devices - size] += count
                continue
            each = self.devices // size
            whole, rest = divmod(count, each)
            taken += whole + bool(rest)
            free[self.devices - each * size] += whole
            if rest:
                free[self.devices - rest * size] += 1
        return taken

    def cost(self, *groups: Group) -> float | None:
        """$/hour."""
        return None if self.price is None else self.price * self.packages(*groups)

    def share(self, size: int) -> float | None:
        """$/hour of one engine of `size` devices where packages are as full of such as they can be."""
        if self.price is None:
            return None
        return self.price * math.ceil(size / self.devices) if size > self.devices else self.price / (self.devices // size)

    def most(self, size: int, cost: float) -> int:
        """How many engines of `size` devices cost no more than `cost` $/hour."""
        assert self.price is not None
        packages = math.floor(cost / self.price * (1 + 1e-9))
        return packages // math.ceil(size / self.devices) if size > self.devices else packages * (self.devices // size)


DEVICES = Rent(1, 1.0)
"""Where devices are counted and not dollars: those that compute."""


def rent(place: Cluster) -> Rent:
    """A single device (`h100`) is rented as such, as many as it takes; devices that were counted (`h100x4`), a named node (`dgx-h100`) or a rack
    whole, however many of its devices are used."""
    if place.rack is None:
        return Rent(place.node.devices, place.node.hourly_price)
    price = place.hourly_price
    return Rent(place.rack.devices, None if price is None else price * place.rack.nodes / place.nodes)
