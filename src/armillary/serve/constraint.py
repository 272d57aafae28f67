"""What may come next in an answer that has to follow a grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Constraint(Protocol):
    """Belongs to one request. The engine feeds it each accepted token once, also when the sequence is preempted and computed again."""

    def mask(self, drafts: Sequence[int]) -> Tensor:
        """Which tokens may come after what was accepted, and after each further draft: int32 [1 + len(drafts), ceil(vocabulary / 32)].

        Bit t % 32 of word t // 32 is token t. Changes nothing. Rows that stand behind a draft which may not come are of no
        consequence. Called on the executor's thread.
        """
        ...

    def accept(self, token: int) -> None:
        """The answer goes on with `token`, which the mask let through."""
        ...

    @property
    def finished(self) -> bool:
        """Nothing can follow: the answer ends, as if it had met its end-of-sequence token."""
        ...
