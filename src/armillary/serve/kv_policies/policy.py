"""What a KV policy says of a sequence: how many blocks it holds, which of them it still needs, and who else may have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from armillary.kernels.seen import Seen

Backend = Literal["native", "torch"]


@dataclass(frozen=True, slots=True)
class Options:
    """The numbers that policies are made of, as `EngineConfig` has them; all in tokens but `dense_layers`."""

    block_size: int
    max_batch_tokens: int
    sinks: int
    window: int
    budget: int
    dense_layers: int
    patterns: str | None = None  # a file's path


class KVPolicy(Protocol):
    """Pure: numbers in, numbers out. Block tables, pool and prefix cache act on it, kernels read by it (`seen`).

    `positional`: what a table holds of a sequence's beginning is what any sequence that begins alike would hold, so blocks may
    be shared from the front on. A policy that gives memory back in the middle is not.
    """

    @property
    def name(self) -> str: ...

    @property
    def backends(self) -> tuple[Backend, ...]:
        """Who has its kernels."""
        ...

    @property
    def positional(self) -> bool: ...

    @property
    def unshareable(self) -> str | None:
        """Why nothing that it computes may be another sequence's, in words that follow its name; None where the beginning may."""
        ...

    @property
    def takes_drafts(self) -> bool:
        """Whether tokens that turn out wrong leave no trace."""
        ...

    @property
    def unbounded(self) -> bool:
        """Whether a sequence may be longer than the model's context: what is read never is."""
        ...

    @property
    def most_blocks(self) -> int | None:
        """KV blocks that a sequence owns at most, however long it is; None: as many as its tokens fill."""
        ...

    @property
    def sink_blocks(self) -> int:
        """Blocks at the beginning of a table that stay."""
        ...

    @property
    def seen(self) -> Seen:
        """What a query reads."""
        ...

    def beside(self, head_dim: int) -> int:
        """Bytes that a token takes beside its key and value, for each layer and key/value head."""
        ...

    def dropped(self, computed: int) -> int:
        """How many blocks after the sinks' no query from position `computed` on reads."""
        ...

    def shareable(self, prompt: int, computed: int) -> int:
        """How many of a sequence's `computed` first tokens have the keys and values that any prompt would give them."""
        ...


class Dense:
    """Every key and value is kept, and every query reads all of them."""

    name: ClassVar[str] = "dense"
    backends: ClassVar[tuple[Backend, ...]] = ("native", "torch")
    positional: ClassVar[bool] = True
    unbounded: ClassVar[bool] = False
    takes_drafts: ClassVar[bool] = True
    unshareable: ClassVar[str | None] = None

    def __init__(self, options: Options) -> None:
        self.options = options

    @property
    def most_blocks(self) -> int | None:
        return None

    @property
    def sink_blocks(self) -> int:
        return 0

    @property
    def seen(self) -> Seen:
        return Seen()

    def beside(self, head_dim: int) -> int:
        return 0

    def dropped(self, computed: int) -> int:
        return 0

    def shareable(self, prompt: int, computed: int) -> int:
        return computed
