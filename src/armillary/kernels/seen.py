"""How much of what is before a query it reads: bounds that hold memory or time constant. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.core.errors import InputError

PAGE = 16  # tokens of a page that queries select: a tile of the native cache (cpu/page_select.h)
UNIT = 128  # tokens of a unit that is looked up (block_memory.py) ...
REPRESENTATIVES = 4  # ... by as many of its keys
MAX_SINKS = 512  # kSegment of cpu/attention.h


def page_bound_bytes(head_dim: int) -> int:
    """Of one head's bounds of a page's keys: the largest of each component and of its negative, as bytes, and their scale."""
    return 2 * head_dim + 4


@dataclass(frozen=True, slots=True)
class Seen:
    """What a query reads of the positions up to its own; by default all. At most one of the two bounds is set.

    `pages`: of each key/value head so many pages of 16 tokens (Quest, `cpu/page_select.h`): the `first_pages` first, the
    `last_pages` last, which end with its own, and the best of the others by their keys' bounds; all of them in the first
    `dense_layers` layers, in layers with a sliding window, and in a prompt.
    `rolling`: the first `sinks` tokens, and at least the last `rolling` (less than a KV block more), the sinks moved up to the
    others (StreamingLLM, `Sinks` in `cpu/attention.h`).
    """

    pages: int = 0
    first_pages: int = 0
    last_pages: int = 1
    dense_layers: int = 0
    sinks: int = 0
    rolling: int = 0

    def __post_init__(self) -> None:
        if self.pages and self.rolling:
            raise InputError("a query selects pages or sees a rolling window, not both", "give one of the two")
        if not 0 <= self.sinks <= MAX_SINKS:
            raise InputError(f"{self.sinks} sinks are asked for", f"give 0 to {MAX_SINKS}")
        if min(self.pages, self.dense_layers, self.rolling) < 0:
            raise InputError("a bound of what a query sees is negative", "give 0 or more")
        if self.pages and not (self.first_pages >= 0 and 1 <= self.last_pages <= self.pages - self.first_pages):
            raise InputError(
                f"of {self.pages} pages that are read, the first {self.first_pages} and the last {self.last_pages} are always among them",
                "always read at least the last, and no more than are read in all",
            )

    def first(self, position: int, block_size: int) -> int:
        """The first position beside the sinks that a query at `position` sees: a block's first; 0 where it sees all."""
        start = max(0, position + 1 - self.rolling) // block_size * block_size if self.rolling else 0
        return start if start > self.sinks else 0

    def droppable(self, position: int, block_size: int) -> int:
        """How many whole blocks stand between those of the sinks and the first that a query at `position` sees."""
        return max(0, self.first(position, block_size) // block_size - -(-self.sinks // block_size))
