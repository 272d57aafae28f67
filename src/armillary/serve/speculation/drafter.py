"""Who proposes the tokens that may come next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from armillary.serve.request import Request

if TYPE_CHECKING:
    from torch import Tensor


class Proposer(Protocol):
    """Asked on the engine's thread before each iteration, without the engine's lock: a request may be cancelled meanwhile."""

    name: str

    def prepare(self, requests: Sequence[Request]) -> None:
        """Catch up with what these know; what that takes is not counted as the cost of drafting."""
        ...

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[tuple[int, ...]]:
        """Up to `most[i]` tokens that may follow what `requests[i]`, which is decoding, knows; none is no loss."""
        ...

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        """What each token last proposed for `request` was drawn from [vocabulary]; none where they were named outright."""
        ...

    def forget(self, request: Request) -> None:
        """The request has ended; it may never have been proposed for."""
        ...


class Drafter(Protocol):
    """What an engine asks, and tells what came of it; `propose`, `laws` and `forget` are a proposer's."""

    name: str

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[tuple[int, ...]]: ...

    def laws(self, request: Request) -> tuple[Tensor, ...]: ...

    def forget(self, request: Request) -> None: ...

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        """Of the `drafted` tokens that the model was shown it accepted the first `accepted`."""
        ...

    def ran(self, tokens: int, duration: int) -> None:
        """An iteration of `tokens` tokens took `duration` ns."""
        ...
