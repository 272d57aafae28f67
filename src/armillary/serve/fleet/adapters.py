"""A fleet's adapters: those that it was started with, which each replica holds for itself."""

from __future__ import annotations

from collections.abc import Collection

from armillary.serve.adapters import unknown


class NamedAdapters:
    """`surface.Adapters` by name alone: requests carry the name to a replica, which has the weights."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = tuple(names)

    def is_ready(self, name: str) -> bool:
        return True

    def prepare(self, name: str) -> None: ...

    def key(self, name: str) -> str:
        """Raises NotFoundError with the closest name."""
        if name not in self.names:
            raise unknown(name, self.names)
        return name
