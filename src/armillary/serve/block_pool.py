"""Which KV blocks are free: integers only, so that real and virtual executors share it."""

from __future__ import annotations

from collections.abc import Iterable

from armillary.core.errors import ArmillaryError, CapacityError, InputError


class BlockPool:
    """A pool of `total` KV blocks of `block_size` tokens, numbered from 0 (Kwon et al., "PagedAttention", SOSP 2023).

    `allocate` and `free` take constant time a block. Neighbouring numbers are handed out where that costs nothing,
    because a run of blocks can be read as one slice. A block that is freed twice, or was never the pool's, is an error:
    it means that two sequences believe they own the same memory.
    """

    def __init__(self, total: int, block_size: int) -> None:
        if total < 1:
            raise InputError(f"a KV pool of {total} blocks holds nothing", "give it at least 1 block")
        if block_size < 1:
            raise InputError(f"a KV block of {block_size} tokens holds nothing", "use a block size of at least 1")
        self.total = total
        self.block_size = block_size
        self._free = list(range(total - 1, -1, -1))  # a stack: the next block is the last
        self._place = list(range(total - 1, -1, -1))  # block -> where it lies in the stack; -1 while it is used

    @property
    def free_count(self) -> int:
        return len(self._free)

    @property
    def used_count(self) -> int:
        return self.total - len(self._free)

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` blocks, all or nothing; `after` is the block that the first should follow when it can.

        Raises CapacityError when fewer are free: schedulers ask `free_count` first.
        """
        if count < 0:
            raise InputError(f"cannot allocate {count} KV blocks", "ask for 0 or more")
        if count > len(self._free):
            raise CapacityError(
                f"{count} KV blocks wanted, {len(self._free)} of {self.total} free", "preempt a sequence or wait for one to end"
            )
        taken: list[int] = []
        for _ in range(count):
            follower = self.total if after is None else after + 1
            block = follower if follower < self.total and self._place[follower] >= 0 else self._free[-1]
            self._take(block)
            taken.append(block)
            after = block
        return taken

    def free(self, blocks: Iterable[int]) -> None:
        """Give blocks back, all or nothing. Raises ArmillaryError on a foreign block, a double free or a repetition."""
        given = list(blocks)
        for block in given:
            if not 0 <= block < self.total:
                raise ArmillaryError(f"KV block {block} is not of this pool (0..{self.total - 1})", "free only what allocate() returned")
            if self._place[block] >= 0:
                raise ArmillaryError(f"KV block {block} is freed twice", "clear the block table when its sequence gives its blocks back")
        if len(set(given)) != len(given):
            raise ArmillaryError("a KV block is named twice in one free()", "a block table holds each block once")
        for block in reversed(given):  # so that the first of them is the next to be handed out
            self._place[block] = len(self._free)
            self._free.append(block)

    def check(self) -> None:
        """Assert the invariants: every block is either free, in exactly one place of the stack, or used."""
        if len(self._place) != self.total:
            raise ArmillaryError(f"the KV pool lost track of its size: {len(self._place)} places for {self.total} blocks")
        for place, block in enumerate(self._free):
            if self._place[block] != place:
                raise ArmillaryError(f"KV block {block} lies at {place} of the free stack but is recorded at {self._place[block]}")
        recorded = sum(place >= 0 for place in self._place)
        if recorded != len(self._free):
            raise ArmillaryError(f"{recorded} KV blocks are recorded as free, {len(self._free)} are in the free stack")

    def _take(self, block: int) -> None:
        """Remove a free block from the stack: the last one fills its place."""
        place = self._place[block]
        last = self._free.pop()
        if last != block:
            self._free[place] = last
            self._place[last] = place
        self._place[block] = -1
