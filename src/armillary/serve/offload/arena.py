"""The accelerator's memory: so many bytes, handed out once, and not one more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from armillary.core.errors import CapacityError
from armillary.core.units import format_bytes

ALIGNMENT = 64  # of every tensor: a vector, a cache line


class Arena:
    """`capacity` bytes that stand for the memory of an accelerator. What is taken stays taken; `contents` says for what.

    On this machine it is ordinary memory, of which the rest of the process has more: the limit is what is kept here.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.contents: dict[str, int] = {}
        self._bytes = aligned(capacity)

    def take(self, size: int, what: str) -> Tensor:
        """`size` bytes, [size] uint8 that begin at a multiple of 64. Raises CapacityError when they are not there."""
        self.reserve(size, what)
        return self._bytes[self.used - rounded(size) :][:size]

    def reserve(self, size: int, what: str) -> None:
        """Count `size` bytes that torch will allocate by itself: the intermediate results of a computation."""
        size = rounded(size)
        if self.used + size > self.capacity:
            held = ", ".join(f"{name} {format_bytes(part)}" for name, part in self.contents.items())
            raise CapacityError(
                f"the accelerator's {format_bytes(self.capacity)} do not hold {format_bytes(size)} of {what}"
                + (f" beside {held}" if held else ""),
                "keep less of the weights or the cache there, or raise offload_memory",
                field="offload_memory",
            )
        self.used += size
        self.contents[what] = self.contents.get(what, 0) + size


def rounded(size: int) -> int:
    """`size` bytes and the gap to the next multiple of 64."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def aligned(size: int) -> Tensor:
    """[size] uint8 zeros from the system, untouched until they are used, that begin at a multiple of 64."""
    raw = np.zeros(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return torch.from_numpy(raw[start : start + size])


def as_floats(raw: Tensor, shape: Sequence[int]) -> Tensor:
    """float32 of `shape` at the beginning of `raw` bytes."""
    size = 4 * int(np.prod(shape))
    return raw[:size].view(torch.float32).view(*shape)
