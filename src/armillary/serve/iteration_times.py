"""What recent iterations took, for policies that bound an iteration by time."""

from __future__ import annotations

from collections import deque

KEPT = 4  # iterations of each power of two of tokens


class IterationTimes:
    """The last `KEPT` iterations of each power of two of tokens, so that a long run of small ones forgets no large one."""

    def __init__(self) -> None:
        self._classes: dict[int, deque[tuple[int, int, int]]] = {}
        self._count = 0

    def note(self, tokens: int, duration: int) -> None:
        """An iteration of `tokens` tokens took `duration` ns."""
        self._count += 1
        self._classes.setdefault(tokens.bit_length(), deque(maxlen=KEPT)).append((self._count, tokens, duration))

    def recent(self) -> tuple[tuple[int, int], ...]:
        """(tokens, ns) of those kept, oldest first."""
        return tuple((tokens, duration) for _, tokens, duration in sorted(one for kept in self._classes.values() for one in kept))
