"""What recent iterations took, for policies that bound an iteration by time."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import overload

KEPT = 4  # iterations of each power of two of tokens


class IterationTimes(Sequence[tuple[int, int]]):
    """(tokens, ns) of the last `KEPT` iterations of each power of two of tokens, oldest first: a long run of small ones forgets no large one.

    Put in order when it is read, which most policies never do.
    """

    def __init__(self) -> None:
        self._classes: dict[int, deque[tuple[int, int, int]]] = {}
        self._count = 0
        self._ordered: tuple[tuple[int, int], ...] | None = ()

    def note(self, tokens: int, duration: int) -> None:
        """An iteration of `tokens` tokens took `duration` ns."""
        self._count += 1
        self._ordered = None
        size = tokens.bit_length()
        kept = self._classes.get(size)
        if kept is None:
            kept = self._classes[size] = deque(maxlen=KEPT)
        kept.append((self._count, tokens, duration))

    def recent(self) -> tuple[tuple[int, int], ...]:
        """All of them, as they are now."""
        if self._ordered is None:
            self._ordered = tuple((tokens, ns) for _, tokens, ns in sorted(one for kept in self._classes.values() for one in kept))
        return self._ordered

    def __len__(self) -> int:
        return sum(len(kept) for kept in self._classes.values())

    @overload
    def __getitem__(self, place: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[tuple[int, int], ...]: ...
    def __getitem__(self, place: int | slice) -> tuple[int, int] | tuple[tuple[int, int], ...]:
        return self.recent()[place]
