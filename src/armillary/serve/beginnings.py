"""Which earlier request a request began as: what a trace must say for its prompts to be shared again."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from armillary.serve.request import Request

_MOST: Final = 1 << 16  # blocks whose first owner is remembered, some 15 MB


class Beginnings:
    """By the names that the prefix cache gives to full blocks, each of which stands for everything from the beginning on.

    It remembers who had each of the last blocks first, whether or not these are still in the cache. Without a prefix cache blocks have no names, and nobody
    shares anything.
    """

    def __init__(self, block_size: int) -> None:
        self._size = block_size
        self._first: OrderedDict[bytes, str] = OrderedDict()

    def of(self, request: Request) -> tuple[str, int]:
        """Of a request that ends: the id of the one that ended before it and had most of its first tokens, and how many; ("", 0) for none."""
        first, names, earlier, shared = self._first, request.block_names[: request.computed // self._size], "", 0
        for name in names:
            owner = first.get(name)
            if owner is None:
                break
            earlier, shared = owner, shared + 1
            first.move_to_end(name)
        for name in names[shared:]:
            first.setdefault(name, request.id)
        while len(first) > _MOST:
            first.popitem(last=False)
        return earlier, shared * self._size
