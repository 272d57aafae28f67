"""StreamingLLM: attention sinks and a rolling window, for streams without end (Xiao et al., ICLR 2024)."""

from __future__ import annotations

from typing import ClassVar

from armillary.core.errors import InputError
from armillary.kernels.seen import MAX_SINKS, Seen
from armillary.serve.kv_policies.policy import Dense, Options


class Streaming(Dense):
    """A query sees the first `sinks` tokens and at least the last `window`, the sinks as if they stood right before these.

    Blocks between the two leave the table as soon as nobody sees them and come back at its end, so a sequence holds the sinks,
    the window and one iteration's tokens, however long it is. It does not remember what has left: context is not extended,
    a stream is kept going. What it holds is no beginning of anything, so nothing is shared with other sequences.
    """

    name: ClassVar[str] = "streaming"
    positional: ClassVar[bool] = False
    unshareable: ClassVar[str | None] = "gives back blocks of the middle of a sequence, and the prefix cache keeps whole beginnings"
    unbounded: ClassVar[bool] = True

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.sinks > MAX_SINKS:
            raise InputError(f"kv_sinks is {options.sinks}", f"give 0 to {MAX_SINKS}", field="kv_sinks")

    @property
    def sink_blocks(self) -> int:
        return -(-self.options.sinks // self.options.block_size)

    @property
    def most_blocks(self) -> int:
        # A window of whole blocks begins up to one block early, and an iteration's tokens end within another.
        options = self.options
        return self.sink_blocks + -(-(options.window + options.max_batch_tokens) // options.block_size) + 2

    @property
    def seen(self) -> Seen:
        return Seen(sinks=self.options.sinks, rolling=self.options.window)

    def dropped(self, computed: int) -> int:
        return self.seen.droppable(computed, self.options.block_size)
