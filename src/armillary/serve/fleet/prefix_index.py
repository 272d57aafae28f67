"""What each replica was sent: which of a prompt's blocks it may still have in its prefix cache."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class PrefixIndex:
    """The names of the blocks that one replica computed last, at most as many as its KV pool has.

    Names are those of `prefix_cache`: each stands for everything from the beginning on, so that a match is a walk along a prompt's
    own names. It is a guess (the replica forgets by its own rules), and a wrong one costs time, never an answer.
    """

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._names: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._names)

    def matched(self, names: Sequence[bytes]) -> int:
        """How many of the first blocks the replica was sent before."""
        count = 0
        for name in names:
            if name not in self._names:
                break
            count += 1
        return count

    def sent(self, names: Sequence[bytes]) -> None:
        """The replica computes these now; the end of a prompt is forgotten before its beginning, as in the pool."""
        for name in reversed(names):
            self._names[name] = None
            self._names.move_to_end(name)
        while len(self._names) > self._blocks:
            self._names.popitem(last=False)

    def clear(self) -> None:
        """The replica died, and its cache with it."""
        self._names.clear()
