"""One operation of a model on one device, as counts: what a cost model turns into time and nothing else does."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Kind(StrEnum):
    """What bounds an operation, and so which cost model reads it."""

    GEMM = "gemm"  # matrix products with weights: m, n, k
    ATTENTION = "attention"  # queries with cached keys and values
    MEMORY = "memory"  # elementwise, norms, look-ups: bound by bytes
    COLLECTIVE = "collective"  # among the ranks of an axis
    SEND = "send"  # to one peer, the next pipeline stage


class Axis(StrEnum):
    """Along which axis of the layout an operation communicates. Ranks are numbered tensor first, then data, then pipeline."""

    TENSOR = "tensor"
    EXPERT = "expert"
    PIPELINE = "pipeline"


COLLECTIVES: Final = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""The names of operations of kind COLLECTIVE."""


@dataclass(frozen=True, slots=True)
class Operation:
    """Counts of one repetition on one device; `repeat` layers do the same.

    A GEMM is `matrices` products [m, k] x [k, n] (experts; else one). In attention m is the query tokens, n the query heads and k the width
    of their keys; in what is bound by memory m is the tokens. FLOPs count a multiply-add as two and attention causally: a query
    reads what precedes it. Bytes are those that a kernel which fuses nothing more than `name` says must move: `weight_bytes` of weights
    and `kv_bytes` of cached keys and values (read and written) lie in the device's memory whatever the batch, `read_bytes` and
    `write_bytes` are activations.

    `message_bytes` is the size by which a collective is known: the tensor that every rank holds before an all_reduce or a reduce_scatter
    and after an all_gather; what one rank hands out in an all_to_all, its own share included; what is sent to the peer in a send.
    `ranks` take part.
    """

    name: str  # "qkv", "prefill_attention", "decode_attention", "o", "gate_up", "down", "lm_head", "norm", "all_reduce", ...
    kind: Kind
    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    m: int = 0
    n: int = 0
    k: int = 0
    matrices: int = 1
    message_bytes: int = 0
    ranks: int = 1
    axis: Axis | None = None
    repeat: int = 1

    @property
    def bytes(self) -> int:
        """What one repetition moves to and from the device's memory, a message's own reads and writes left to the collective's cost."""
        return self.weight_bytes + self.kv_bytes + self.read_bytes + self.write_bytes

    @property
    def intensity(self) -> float:
        """FLOPs a byte of memory; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over operations, repetitions counted. `messages` is the number of collectives and sends, `message_bytes` their sizes summed."""

    flops: int = 0
    weight_bytes: int = 0
    kv_bytes: int = 0
    read_bytes: int = 0
    write_bytes: int = 0
    message_bytes: int = 0
    messages: int = 0

    @property
    def bytes(self) -> int:
        return self.weight_bytes + self.kv_bytes + self.read_bytes + self.write_bytes

    @property
    def intensity(self) -> float:
        return self.flops / self.bytes if self.bytes else 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.read_bytes + other.read_bytes,
            self.write_bytes + other.write_bytes,
            self.message_bytes + other.message_bytes,
            self.messages + other.messages,
        )


def total(operations: Iterable[Operation]) -> Totals:
    """The sum of all repetitions of all operations."""
    flops = weights = kv = read = write = sent = messages = 0
    for operation in operations:
        repeat = operation.repeat
        flops += operation.flops * repeat
        weights += operation.weight_bytes * repeat
        kv += operation.kv_bytes * repeat
        read += operation.read_bytes * repeat
        write += operation.write_bytes * repeat
        sent += operation.message_bytes * repeat
        messages += repeat if operation.kind in (Kind.COLLECTIVE, Kind.SEND) else 0
    return Totals(flops, weights, kv, read, write, sent, messages)
