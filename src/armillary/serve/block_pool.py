"""Which KV blocks are free, used or kept for later: integers only, so that real and virtual executors share it."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

from armillary.core.errors import ArmillaryError, CapacityError, InputError

_ONE: Final = array("i", (1,))
_NUMBERS: Final = list(range(1 << 14))  # the same objects in the tables of all pools: a simulated cluster's memory is read less


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
        # Packed, and no longer than what has been used, for a simulated cluster has thousands of pools.
        self._users = array("i")  # block -> how many; of a free one ~(where it lies in the stack). Those from its end on were never taken
        self._free: list[int] = []  # a stack of blocks that were given back: the next is the last
        self._kept: set[int] = set()
        self._idle: OrderedDict[int, None] = OrderedDict()  # the one that goes next is the first

    @property
    def free_count(self) -> int:
        """Blocks that `allocate` can give, idle ones among them."""
        return self.total - len(self._users) + len(self._free) + len(self._idle)

    @property
    def idle_count(self) -> int:
        return len(self._idle)

    @property
    def used_count(self) -> int:
        return self.total - self.free_count

    def references(self, block: int) -> int:
        """How many sequences use a block."""
        return max(0, self._users[block]) if block < len(self._users) else 0

    def allocate(self, count: int, after: int | None = None) -> list[int]:
        """Take `count` blocks, all or nothing; `after` is the block that the first should follow when it can.

        Raises CapacityError when fewer are free: schedulers ask `free_count` first.
        """
        if count < 0:
            raise InputError(f"cannot allocate {count} KV blocks", "ask for 0 or more")
        users, stack, fresh = self._users, self._free, self.total - len(self._users)
        if count > len(stack) + fresh:
            if count > self.free_count:
                raise CapacityError(
                    f"{count} KV blocks wanted, {self.free_count} of {self.total} free", "preempt a sequence or wait for one to end"
                )
            while count > len(stack) + fresh:  # all at once, so that neighbours among them are found
                self._forget_oldest()
        taken, known = list[int](), len(users)
        follower = self.total if after is None else after + 1
        while len(taken) < count:
            if follower == known or not stack:  # what was never taken follows itself
                more = min(count - len(taken), self.total - known)
                if more:
                    taken.extend(_NUMBERS[known : known + more] if known + more <= len(_NUMBERS) else range(known, known + more))
                    users.extend(_ONE * more)
                    known += more
                    follower = known
                    continue
            block = last = stack.pop()
            if follower != last and follower < known and (at := ~users[follower]) >= 0:
                block = stack[at]  # the follower lies further down the stack: the last one fills its place
                stack[at] = last
                users[last] = ~at
            users[block] = 1
            taken.append(block)
            follower = block + 1
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One user more of blocks that are used or idle."""
        for block in blocks:
            if not self.references(block) and block not in self._idle:
                raise ArmillaryError(f"KV block {block} is shared, but it is free", "share only what is used or kept")
            self._idle.pop(block, None)
            self._users[block] += 1

    def keep(self, block: int) -> None:
        """From its last user's end on a used block is idle, not free."""
        if not self.references(block):
            raise ArmillaryError(f"KV block {block} is to be kept, but nobody uses it", "keep a block while its sequence has it")
        self._kept.add(block)

    def free(self, blocks: Iterable[int]) -> None:
        """One user less of each, all or nothing. Raises ArmillaryError on a foreign block, a double free or a repetition.

        Of those that become idle the first is kept longest: the beginning of a sequence is of use without its end, not the reverse.
        """
        given = list(blocks)
        given.reverse()  # so that the first of them is the next to be handed out
        if not given:
            return
        users, stack, kept = self._users, self._free, self._kept
        low, high, counts = min(given), max(given), list[int]()
        if low < 0 or high >= self.total:
            foreign = low if low < 0 else high
            raise ArmillaryError(f"KV block {foreign} is not of this pool (0..{self.total - 1})", "free only what allocate() returned")
        if high < len(users):
            counts = [users[block] for block in given]
        if not counts or min(counts) < 1:
            unused = next(block for block in given if not self.references(block))
            raise ArmillaryError(f"KV block {unused} is freed twice", "clear the block table when its sequence gives its blocks back")
        if len(set(given)) != len(given):
            raise ArmillaryError("a KV block is named twice in one free()", "a block table holds each block once")
        for block, count in zip(given, counts, strict=True):
            if count == 1 and block not in kept:
                users[block] = ~len(stack)
                stack.append(block)
                continue
            users[block] = count - 1
            if count == 1:
                self._idle[block] = None

    def check(self) -> None:
        """Assert the invariants: every block is in exactly one place: the free stack, idle, used, or never taken."""
        if len(self._users) > self.total:
            raise ArmillaryError(f"the KV pool lost track of its size: it knows {len(self._users)} blocks of {self.total}")
        for place, block in enumerate(self._free):
            if self._users[block] != ~place:
                raise ArmillaryError(f"KV block {block} lies at {place} of the free stack but is recorded as {self._users[block]}")
        recorded = sum(count < 0 for count in self._users)
        if recorded != len(self._free):
            raise ArmillaryError(f"{recorded} KV blocks are recorded as free, {len(self._free)} are in the free stack")
        for block, count in enumerate(self._users):
            if (count == 0) != (block in self._idle) or (block in self._idle and block not in self._kept):
                raise ArmillaryError(f"KV block {block} has {count} users and is {'' if block in self._idle else 'not '}idle")

    def _forget_oldest(self) -> None:
        """Frees the idle block that has been so longest."""
        block, _ = self._idle.popitem(last=False)
        self._kept.discard(block)
        self._forgotten(block)
        self._users[block] = ~len(self._free)
        self._free.append(block)
