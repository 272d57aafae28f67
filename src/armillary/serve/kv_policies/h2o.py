"""H2O: keys and values that little attention goes to are evicted, head by head (Zhang et al., NeurIPS 2023)."""

from __future__ import annotations

from typing import ClassVar

from armillary.serve.kv_policies.policy import Backend, Dense, Options


class H2O(Dense):
    """Each layer and key/value head keeps `budget` tokens by the attention that they have gathered, and the last `window`.

    A sequence holds these and one block, however long it is; what it holds differs from head to head and is no beginning of
    anything, so nothing is shared, and a refused draft could not be taken back out of what was gathered.
    """

    name: ClassVar[str] = "h2o"
    backends: ClassVar[tuple[Backend, ...]] = ("torch",)
    positional: ClassVar[bool] = False
    unshareable: ClassVar[str | None] = "gives back blocks of the middle of a sequence, and the prefix cache keeps whole beginnings"
    takes_drafts: ClassVar[bool] = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.heavy, self.recent = options.budget, options.window

    @property
    def most_blocks(self) -> int:
        return -(-(self.heavy + self.recent) // self.options.block_size) + 1

    def beside(self, head_dim: int) -> int:
        return 8  # its position and what it was attended
