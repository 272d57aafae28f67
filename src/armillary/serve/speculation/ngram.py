"""Prompt lookup: what followed the last time that the text stood as it stands now (Saxena 2023; vLLM's n-gram proposer)."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from armillary.serve.request import Request

if TYPE_CHECKING:
    from torch import Tensor

WORD = array("i").itemsize


class NGram:
    """Finds the longest n-gram, `longest` down to `shortest` tokens, that ends the known tokens and occurs before; of several the latest.

    What follows it is proposed, and goes on with itself where it reaches the end: a text that repeats itself is continued to any length.
    """

    name = "ngram"

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._known: dict[str, array[int]] = {}

    def prepare(self, requests: Sequence[Request]) -> None:
        pass

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        return [self._continued(request, bound) if bound else () for request, bound in zip(requests, most, strict=True)]

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        return ()

    def forget(self, request: Request) -> None:
        self._known.pop(request.id, None)

    def _continued(self, request: Request, count: int) -> tuple[int, ...]:
        known = self._known.get(request.id)
        if known is None:
            known = self._known[request.id] = array("i", request.prompt)
        known.extend(request.output[len(known) - len(request.prompt) :])
        start = self._after_match(known)
        if start is None:
            return ()
        period = len(known) - start
        return tuple(known[start + ahead % period] for ahead in range(count))

    def _after_match(self, known: array[int]) -> int | None:
        """The place after the n-gram that is found."""
        text = known.tobytes()
        for size in self._sizes:
            if len(known) <= size:
                continue
            wanted, end = text[-size * WORD :], len(text) - WORD  # it may overlap the suffix, but not be it
            while (found := text.rfind(wanted, 0, end)) >= 0:
                if found % WORD == 0:
                    return found // WORD + size
                end = found + len(wanted) - 1
        return None
