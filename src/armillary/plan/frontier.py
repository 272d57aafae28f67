"""Cost against latency: a model on parts of a cluster of every size, in batches of every size, and what nothing beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from armillary.cluster.cluster import Cluster
from armillary.core.errors import CapacityError, InputError
from armillary.models.graph.architecture import Architecture
from armillary.models.graph.precision import Precision
from armillary.plan.partition import Phase, Plan, Problem, mesh


@dataclass(frozen=True)
class Point:
    """The quickest partition of so many chips for such a batch, in a format of weights."""

    plan: Plan
    weights: str

    @property
    def latency(self) -> float:
        """s of a pass: a token in decode, the whole prompt in prefill."""
        return self.plan.seconds

    @property
    def cost(self) -> float:
        """Seconds of a chip a token."""
        return self.plan.chip_seconds


def points(
    model: Architecture,
    cluster: Cluster,
    precision: Precision,
    phase: Phase,
    context: int,
    *,
    weights: Sequence[str],
    most_chips: int | None = None,
    most_sequences: int = 1024,
) -> list[Point]:
    """For 1, 2, 4, ... chips and sequences; what does not fit is left out."""
    found: list[Point] = []
    most = cluster.devices if most_chips is None else most_chips
    for chips in (1 << power for power in range(most.bit_length())):
        try:
            place = mesh(cluster, chips)
        except InputError:
            continue  # no part of this torus has so many
        for name in weights:
            problem = Problem(model, cluster, place, replace(precision, weights=name))
            for sequences in (1 << power for power in range(most_sequences.bit_length())):
                try:
                    best = problem.ranked(phase, sequences, context)[0]
                except CapacityError:
                    break  # nor do more sequences fit
                found.append(Point(best, name))
    return found


def frontier(those: Sequence[Point]) -> list[Point]:
    """Those that no other is better than in one of latency and cost and as good in the other; the quickest first."""
    best: list[Point] = []
    for point in sorted(those, key=lambda one: (one.latency, one.cost)):
        if not best or point.cost < best[-1].cost:
            best.append(point)
    return best
