"""An offloading policy's time taken apart: the terms of the cost model, what each link carries, which tier is full."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Final

import numpy as np

from armillary.plan.offload import Found
from armillary.serve.offload.cost import Hardware, generation_rows, peak_rows, prefill_rows

PREFILL: Final = ("into the accelerator", "out of it", "compute")
GENERATION: Final = ("out of it", "from disk", "to disk", "compute")  # each behind what comes into the accelerator
LINKS: Final = {
    "ram_to_arena": "RAM to accelerator",
    "arena_to_ram_cache": "accelerator to RAM, keys and values",
    "arena_to_ram_hidden": "accelerator to RAM, activations",
    "disk_to_ram": "disk to RAM",
    "ram_to_disk_cache_p": "RAM to disk, keys and values",
    "ram_to_disk_hidden_p": "RAM to disk, activations",
    "ram_to_disk_g": "RAM to disk",
}


@dataclass(frozen=True)
class Phase:
    """Of a layer, in prefill or for a token of every sequence: s in all and of each term, and the bytes that each link carries."""

    seconds: float
    terms: dict[str, float]
    first: float  # what comes into the accelerator before the terms of a token
    carried: dict[str, float]

    @property
    def longest(self) -> str:
        return max(self.terms, key=lambda name: self.terms[name])


def phases(found: Found) -> tuple[Phase, Phase]:
    """What the cost model says of the chosen policy, taken apart: with all rates but one without bound, a term is that one's."""
    work, policy, hardware = found.best.work, found.policy, found.place.hardware(found.best.work)
    at = np.array([1.0, *policy.weights.shares, *policy.cache.shares, *policy.hidden.shares])
    sizes = ("arena", "ram", "disk", "margin", "cpu")
    rates = [field.name for field in fields(Hardware) if field.name not in sizes]

    def alone(name: str) -> Hardware:
        without = {other: math.inf for other in rates if other != name} | ({"cpu": math.inf} if hardware.cpu else {})
        return replace(hardware, **without)

    def largest(rows: list[np.ndarray]) -> float:
        return max(float(one @ at) for one in rows)

    made = []
    for rows, names in ((prefill_rows, PREFILL), (generation_rows, GENERATION)):
        values = [float(one @ at) for one in rows(work, hardware)]
        into = min(float(one @ at) for one in rows(work, alone("ram_to_arena"))) if rows is generation_rows else 0.0
        carried = {LINKS[link]: largest(rows(work, alone(link))) * getattr(hardware, link) for link in LINKS}
        terms = {name: value - into for name, value in zip(names, values, strict=True) if value - into > 1e-12}
        made.append(Phase(max(values), terms, into, {name: size for name, size in carried.items() if size > 0.5}))
    return made[0], made[1]


def full(found: Found) -> list[str]:
    """Tiers that are full to their margin: what another byte of theirs would help."""
    work = found.best.work
    limits = peak_rows(work, found.place.hardware(work))
    return [name for name, (_, limit) in limits.items() if limit and found.best.price.peaks[name] >= 0.99 * limit]
