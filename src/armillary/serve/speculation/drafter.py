"""Who proposes the tokens that may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from armillary.serve.request import Request


class Drafter(Protocol):
    """Asked on the engine's thread before each iteration, without the engine's lock: a request may be cancelled meanwhile."""

    name: str

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Up to `most[i]` tokens that may follow what `requests[i]`, which is decoding, knows; none is no loss."""
        ...

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        """Of the `drafted` tokens that the model was shown it accepted the first `accepted`."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; it may never have been proposed for."""
        ...
