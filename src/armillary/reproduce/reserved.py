"""Orca as PagedAttention's authors had to build it: memory reserved ahead in one piece, from a buddy allocator (Kwon et al., SOSP 2023, section 6.1)."""

from __future__ import annotations

from armillary.serve.policies.entries import decode, entry
from armillary.serve.policies.orders.queue import Queue
from armillary.serve.policies.repetition import repeats
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Hold, Reason, Schedule, State

BOUNDS = ("oracle", "pow2", "max")
"""What is known of an answer's length at admission: itself, the next power of two, that it ends within the context."""


class Buddies:
    """Slots of memory in pieces of powers of two: one that is too large is halved, and halves that are both free are one again (Knuth, 1968)."""

    def __init__(self, slots: int) -> None:
        self._free: dict[int, set[int]] = {}
        at = 0
        for size in (1 << bit for bit in reversed(range(slots.bit_length()))):
            if slots & size:
                self._free.setdefault(size, set()).add(at)
                at += size
        self._most = max(self._free)

    def take(self, slots: int) -> tuple[int, int] | None:
        """The (address, size) of a piece that holds `slots`, or None: the lowest of the smallest that will do."""
        size = 1 << (slots - 1).bit_length()
        found = next((one for one in sorted(self._free) if one >= size and self._free[one]), None)
        if found is None:
            return None
        at = min(self._free[found])
        self._free[found].remove(at)
        while found > size:
            found //= 2
            self._free.setdefault(found, set()).add(at + found)
        return at, size

    def give(self, at: int, size: int) -> None:
        """A piece is free again."""
        while size < self._most and (other := at ^ size) in self._free.get(size, ()):
            self._free[size].remove(other)
            at, size = min(at, other), 2 * size
        self._free.setdefault(size, set()).add(at)


class Reserved:
    """Orca's loop: who waits is admitted, first come, first served, when a piece for the longest that it may become is free; prompts whole, beside decodes.

    What the engine has for keys and values must not bind: this policy says what fits. Unlike those of `serve/policies` it remembers where its
    sequences lie. An answer's true length is its `max_tokens`.
    """

    name = "orca, reserved"
    returns_together = False
    behind = Reason.QUEUE_ORDER

    def __init__(self, bound: str, slots: int, context: int) -> None:
        assert bound in BOUNDS
        self._bound, self._context, self._memory = bound, context, Buddies(slots)
        self._held: dict[str, tuple[int, int]] = {}

    def reserved(self, request: Request) -> int:
        """Slots that a sequence asks for."""
        answer = request.sampling.max_tokens
        if self._bound == "max":
            return self._context
        return min(self._context, len(request.prompt) + (answer if self._bound == "oracle" else 1 << (answer - 1).bit_length()))

    def step(self, state: State) -> Schedule:
        running = {request.id for request in state.running}
        for name in [name for name in self._held if name not in running]:
            self._memory.give(*self._held.pop(name))
        entries: list[Entry] = [decode(request, request.known, len(request.blocks)) for request in state.running]
        for request in state.waiting:
            piece = self._memory.take(self.reserved(request)) if len(entries) < state.limits.max_running else None
            if piece is None:
                reason = Reason.NO_BLOCKS if len(entries) < state.limits.max_running else Reason.NO_SEAT
                return Schedule(state.index, tuple(entries), (), (Hold(request.id, reason),))
            self._held[request.id] = piece
            entries.append(entry(request, request.known, state.limits.blocks_for(request.max_length)))
        return Schedule(state.index, tuple(entries))

    def repeats(self, state: State, schedule: Schedule) -> bool:
        return repeats(state, schedule, Queue())
