"""Which KV blocks are free, used or kept for later: integers only, so that real and virtual executors share it."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable

from armillary.core.errors import ArmillaryError, CapacityError, InputError


class BlockPool:
    """A pool of `total` KV blocks of `block_size` tokens, numbered from 0 (Kwon et al., "PagedAttention", SOSP 2023).

    A block is free, used by `references(block)` sequences, or idle: used by none, but its contents are worth keeping (`keep`).
    Idle blocks count as free. They are taken only when no other is free, the one whose last user left first before the others,
    and then `forgotten(block)` is called.

    `allocate`, `share` and `free` take constant time a block. Neighbouring numbers are handed out where that costs nothing,
    because a run of blocks can be read as one slice. A block that is freed more often than it was taken, or was never the
    pool's, is an error: it means that two sequences believe they own the same memory.
    """

    def __init__(self, total: int, block_size: int, forgotten: Callable[[int], None] = lambda block: None) -> None:
        if total < 1:
            raise InputError(f"a KV pool of {total} blocks holds nothing", "give it at least 1 block")
        if block_size < 1:
            raise InputError(f"a KV block of {block_size} tokens holds nothing", "use a block size of at least 1")
        self.total = total
        self.block_size = block_size
        self._forgotten = forgotten
        # Packed, for a simulated cluster has thousands of pools.
        self._free = array("i", range(total - 1, -1, -1))  # a stack: the next block is the last
        self._place = array("i", range(total - 1, -1, -1))  # block -> where it lies in the stack; -1 while it is not free
        self._references = array("i", bytes(4 * total))
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one that goes next is the first

    @property
    def free_count(self) -> int:
        """Blocks that `allocate` can give, idle ones among them."""
        return len(self._free) + len(self._idle)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def used_count(self) -> int:
        return self.total - self.free_count

    def references(self, block: int) -> int:
        """How many sequences use a block."""
        return self._references[block]

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` blocks, all or nothing; `after` is the block that the first should follow when it can.

        Raises CapacityError when fewer are free: schedulers ask `free_count` first.
        """
        if count < 0:
            raise InputError(f"cannot allocate {count} KV blocks", "ask for 0 or more")
        if count > len(self._free) and count > self.free_count:
            raise CapacityError(
                f"{count} KV blocks wanted, {self.free_count} of {self.total} free", "preempt a sequence or wait for one to end"
            )
        while len(self._free) < count:  # all at once, so that neighbours among them are found
            self._forget_oldest()
        stack, place, references, total, taken = self._free, self._place, self._references, self.total, list[int]()
        follower = total if after is None else after + 1
        for _ in range(count):
            last = stack.pop()
            block = last
            if follower < total and (at := place[follower]) >= 0:
                block = follower
                if block != last:  # it lies further down the stack: the last one fills its place
                    stack[at] = last
                    place[last] = at
            place[block] = -1
            references[block] = 1
            taken.append(block)
            follower = block + 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One user more of blocks that are used or idle."""
        for block in blocks:
            if not self._references[block] and block not in self._idle:
                raise ArmillaryError(f"KV block {block} is shared, but it is free", "share only what is used or kept")
            self._idle.pop(block, None)
            self._references[block] += 1

    def keep(self, block: int) -> None:
        """From its last user's end on a used block is idle, not free."""
        if not self._references[block]:
            raise ArmillaryError(f"KV block {block} is to be kept, but nobody uses it", "keep a block while its sequence has it")
        self._kept.add(block)

    def free(self, blocks: Iterable[int]) -> None:
        """One user less of each, all or nothing. Raises ArmillaryError on a foreign block, a double free or a repetition.

        Of those that become idle the first is kept longest: the beginning of a sequence is of use without its end, not the reverse.
        """
        given = list(blocks)
        total, users = self.total, self._references
        for block in given:
            if not 0 <= block < total:
                raise ArmillaryError(f"KV block {block} is not of this pool (0..{total - 1})", "free only what allocate() returned")
            if not users[block]:
                raise ArmillaryError(f"KV block {block} is freed twice", "clear the block table when its sequence gives its blocks back")
        if len(set(given)) != len(given):
            raise ArmillaryError("a KV block is named twice in one free()", "a block table holds each block once")
        stack, references, kept = self._free, self._references, self._kept
        for block in reversed(given):  # so that the first of them is the next to be handed out
            left = references[block] = references[block] - 1
            if left:
                continue
            if block in kept:
                self._idle[block] = None
            else:
                self._place[block] = len(stack)
                stack.append(block)

    def check(self) -> None:
        """Assert the invariants: every block is in exactly one place: the free stack, idle, or used."""
        if len(self._place) != self.total:
            raise ArmillaryError(f"the KV pool lost track of its size: {len(self._place)} places for {self.total} blocks")
        for place, block in enumerate(self._free):
            if self._place[block] != place:
                raise ArmillaryError(f"KV block {block} lies at {place} of the free stack but is recorded at {self._place[block]}")
        recorded = sum(place >= 0 for place in self._place)
        if recorded != len(self._free):
            raise ArmillaryError(f"{recorded} KV blocks are recorded as free, {len(self._free)} are in the free stack")
        for block, count in enumerate(self._references):
            states = (count > 0) + (self._place[block] >= 0) + (block in self._idle)
            if states != 1 or (block in self._idle and block not in self._kept):
                raise ArmillaryError(f"KV block {block} is in {states} of the states used, free and idle; it has {count} users")

    def _forget_oldest(self) -> None:
        """Frees the idle block that has been so longest."""
        block, _ = self._idle.popitem(last=False)
        self._kept.discard(block)
        self._forgotten(block)
        self._place[block] = len(self._free)
        self._free.append(block)
