"""Which nano-batches, in which order, with which shares of the device: NanoFlow's search in two stages (Zhu et al., OSDI 2025, section 4.1).

First the sizes and the order, as if operations on different resources did not disturb each other (a mixed-integer program, `sim.overlap`);
then, in that order, who gets which share of the device while others run (`sim.interference`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from armillary.core.errors import CapacityError, InputError
from armillary.core.trace import Trace
from armillary.core.units import S, format_bytes
from armillary.models.graph.batch import Batch, Span
from armillary.models.graph.cost import Deployment
from armillary.models.graph.parameters import active_parameters
from armillary.models.graph.work import Work
from armillary.sim import collectives
from armillary.sim.interference import Execution, Interference, best_shares, least
from armillary.sim.operation import Kind, Operation
from armillary.sim.overlap import Overlap, Task, bound, greedy, overlapped, sequential

GRAIN: Final = 128  # tokens: nano-batches are multiples of it, as products' tiles are
_SIZES: Final = 16  # grains of the whole batch that are told apart


@dataclass(frozen=True, slots=True)
class Load:
    """Iterations of `tokens` tokens in a steady state: requests of `prompt` tokens that are answered with `answer`, of which half are there on average."""

    tokens: int
    prompt: int
    answer: int

    def __post_init__(self) -> None:
        for name, least_of_it in (("tokens", 1), ("prompt", 1), ("answer", 0)):
            if not least_of_it <= getattr(self, name) <= 1 << 20:
                raise InputError(f"{name} is {getattr(self, name):,}", f"give {least_of_it} to {1 << 20:,}", field=name)

    @property
    def decodes(self) -> int:
        return round(self.tokens * self.answer / (self.prompt + self.answer))

    @property
    def cached(self) -> int:
        """Tokens that a decoding sequence has, on average."""
        return self.prompt + self.answer // 2

    def part(self, work: Work, share: float = 1.0) -> Batch:
        """A share of an iteration: as much of its prompts and of its decodes."""
        decodes = round(self.decodes * share)
        new = round(self.tokens * share) - decodes
        spans = []
        for window in work.windows:
            seen = min(self.prompt, window or self.prompt)  # of a prompt's tokens, the last of which reads so many keys
            pairs = round(new * (seen + 1) / 2) if seen == self.prompt else new * seen
            spans.append(Span(pairs, new, decodes * min(self.cached + 1, window or self.cached + 1)))
        return Batch(new, decodes, decodes + -(-new // self.prompt), tuple(spans))


@dataclass(frozen=True)
class Machine:
    """A model on the devices of a replica, with what their products attain (FLOP/s; by default the catalogue's figure)."""

    deployment: Deployment
    flops: float

    def check(self, load: Load) -> None:
        """Raises CapacityError when the decoding sequences' keys and values do not fit, with how much is short and what fits."""
        held, room = load.decodes * load.cached + load.tokens - load.decodes, self.deployment.kv_tokens()
        if held > room:
            each = max(work.kv_bytes_per_token for work in self.deployment.works)
            raise CapacityError(
                f"{load.decodes:,} decoding sequences of {load.cached:,} tokens and the prompts hold {held:,} tokens, {format_bytes((held - room) * each)} a device more "
                f"than fits beside the weights",
                f"what fits: --batch {max(1, load.tokens * room // held):,}, shorter requests, or more devices",
                field="batch",
            )

    def layer(self, load: Load, share: float = 1.0) -> list[tuple[str, str, float]]:
        """(operation, resource, s) of a layer for a share of the batch: products, attention and collectives of the layers that there are most of.

        What an operation needs of the device is what the whole batch's needs: a small part of it may be bound by reading weights, and still
        occupies the units that compute.
        """
        needs = [self.cost(one)[0] for one in self._repeated(load, 1.0)]
        those = zip(self._repeated(load, share), needs, strict=True)
        return [(one.name, resource, self.cost(one)[1]) for one, resource in those if one.kind is not Kind.MEMORY]

    def left_out(self, load: Load) -> float:
        """s of a layer's norms, rotations and sums, were none of them fused with its neighbours."""
        return sum(self.cost(one)[1] for one in self._repeated(load, 1.0) if one.kind is Kind.MEMORY)

    def once(self, load: Load) -> float:
        """s of what an iteration does once: the embedding and the head."""
        work = self.deployment.works[0]
        repeat = self._count(work)
        return sum(self.cost(one)[1] for one in work.operations(load.part(work)) if one.repeat < repeat)

    def cost(self, operation: Operation) -> tuple[str, float]:
        """Which part of the device an operation needs most, and for how long alone."""
        if operation.kind in (Kind.COLLECTIVE, Kind.SEND):
            assert operation.axis is not None
            link, bandwidth = self.deployment.link(operation.axis)
            return "network", collectives.seconds(operation.name, operation.message_bytes, operation.ranks, bandwidth, link.latency / S)
        compute, memory = operation.flops / self.flops, operation.bytes / self.deployment.device.attainable_bandwidth
        return "compute" if compute >= memory else "memory", max(compute, memory)

    @property
    def optimum(self) -> float:
        """Tokens a second and device that nothing exceeds where compute is what is short: Compute / (2 P) (equation 5)."""
        return self.flops / (2 * active_parameters(self.deployment.model))

    def _repeated(self, load: Load, share: float) -> list[Operation]:
        work = self.deployment.works[0]
        repeat = self._count(work)
        return [one for one in work.operations(load.part(work, share)) if one.repeat == repeat]

    def _count(self, work: Work) -> int:
        return max(row.repeat for row in work.rows)

    @property
    def layers(self) -> float:
        """Layers of the model, over those that are scheduled as one."""
        work = self.deployment.works[0]
        return self.deployment.model.num_layers / max(
            1, len({row.name: 0 for row in work.rows if row.name == "o" and row.repeat == self._count(work)})
        )


def tasks(machine: Machine, load: Load, sizes: Sequence[int], layers: int) -> list[Task]:
    """Each nano-batch's operations in a chain; nano-batches know nothing of each other."""
    found: list[Task] = []
    for part, size in enumerate(sizes, 1):
        before: tuple[int, ...] = ()
        for number in range(1, layers + 1):
            for name, resource, seconds in machine.layer(load, size / load.tokens):
                found.append(Task(f"{name}, layer {number}, nano-batch {part}", resource, seconds, before))
                before = (len(found) - 1,)
    return found


@dataclass(frozen=True)
class Schedule:
    """Nano-batches of so many tokens. Times are s of the `layers` that were scheduled together: one operation after another, the order
    alone, the order with shares; `bound` and `least` are what no order beats without and with interference."""

    sizes: tuple[int, ...]
    layers: int
    tasks: tuple[Task, ...]
    order: Overlap
    execution: Execution
    sequential: float
    bound: float
    least: float


@dataclass(frozen=True)
class Found:
    """The search's result: the best schedule, and the best of each number of nano-batches. `whole` is s of one operation after another, unsplit."""

    machine: Machine
    load: Load
    best: Schedule
    tried: tuple[Schedule, ...]
    whole: float

    def throughput(self, seconds: float, unfused: bool = False) -> float:
        """Tokens a second and device of iterations whose layers take so long each; the embedding and the head are added, and what is left out if `unfused`."""
        layer = seconds + unfused * self.machine.left_out(self.load)
        return self.load.tokens / (layer * self.machine.layers + self.machine.once(self.load)) / self.machine.deployment.layout.devices


def search(machine: Machine, load: Load, table: Interference, *, parts: int = 4, layers: int = 2, seconds: float = 5.0) -> Found:
    """The best of up to `parts` nano-batches. Each mixed-integer program is given up after `seconds`, with the best order until then."""
    if not 1 <= parts <= 4:
        raise InputError(f"{parts} nano-batches", "give 1 to 4", field="parts")
    if not 1 <= layers <= 4:
        raise InputError(f"{layers} layers are scheduled together", "give 1 to 4", field="layers")
    machine.check(load)
    found = []
    for count in range(1, parts + 1):
        tried = [tasks(machine, load, sizes, layers) for sizes in splits(load.tokens, count)]
        if not tried:
            break
        sizes, chosen = min(zip(splits(load.tokens, count), tried, strict=True), key=lambda one: greedy(one[1]).makespan)
        order = overlapped(chosen, seconds)
        execution = best_shares(chosen, order.starts, table)
        found.append(Schedule(sizes, layers, tuple(chosen), order, execution, sequential(chosen), bound(chosen), least(chosen, table)))
    return Found(machine, load, min(found, key=lambda one: one.execution.makespan), tuple(found), found[0].sequential)


def splits(tokens: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Sizes of nano-batches, the smaller first, in grains; which of them is first does not matter."""
    grain = GRAIN * max(1, -(-tokens // (GRAIN * _SIZES)))
    if parts == 1:
        yield (tokens,)
    elif parts * grain <= tokens:
        yield from _partitions(tokens, parts, grain, grain)


def _partitions(tokens: int, parts: int, least_size: int, grain: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (tokens,)
        return
    for size in range(least_size, tokens // parts + 1, grain):
        for rest in _partitions(tokens - size, parts - 1, size, grain):
            yield (size, *rest)


def trace(schedule: Schedule, name: str) -> Trace:
    """What runs when on which part of the device, a span for as long as an operation has the same company."""
    made = Trace(name)
    for piece in sorted(schedule.execution.pieces, key=lambda one: (one.start, one.place)):
        task = schedule.tasks[piece.place]
        made.add(
            task.resource, task.name.rpartition(", ")[2], round(piece.start * S), round(piece.end * S), f"{task.name}: {piece.share:.0%} of the device",
            {"speed": piece.speed},
        )  # fmt: skip
    return made
