"""Choices of one answer that wait until the first of them has computed the prompt they share."""

from __future__ import annotations

from collections.abc import Iterator

from armillary.serve.request import Request


class Forks:
    """Waiting sequences by the id of their parent, in the order in which they came; `count` of them."""

    def __init__(self) -> None:
        self._by_parent: dict[str, list[Request]] = {}
        self.count = 0

    def __iter__(self) -> Iterator[Request]:
        return (fork for forks in self._by_parent.values() for fork in forks)

    def add(self, fork: Request) -> None:
        assert fork.parent is not None
        self._by_parent.setdefault(fork.parent.id, []).append(fork)
        self.count += 1

    def remove(self, fork: Request) -> None:
        assert fork.parent is not None
        self._by_parent[fork.parent.id].remove(fork)
        self.count -= 1

    def release(self, parent: Request) -> list[Request]:
        """Those that wait for `parent`, which wait no longer."""
        forks = self._by_parent.pop(parent.id, [])
        self.count -= len(forks)
        return forks

    def clear(self) -> None:
        self._by_parent.clear()
        self.count = 0
