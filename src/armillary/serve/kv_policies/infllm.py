"""InfLLM: a window, and a memory of everything before it that is looked up by blocks (Xiao et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import ClassVar

from armillary.core.errors import InputError
from armillary.kernels.seen import REPRESENTATIVES, UNIT, Seen
from armillary.serve.kv_policies.policy import Backend, Dense, Options


class InfLLM(Dense):
    """A query reads the first `sinks` tokens, at least the last `window`, and `budget` / 128 units of 128 tokens that answer it
    best, all of which stand where the window ends: a sequence may be longer than the model's context, and remembers.

    Every key and value is kept. What was looked up for a prompt's piece shapes its keys, so none are another sequence's.
    """

    name: ClassVar[str] = "infllm"
    backends: ClassVar[tuple[Backend, ...]] = ("torch",)
    positional: ClassVar[bool] = False
    unbounded: ClassVar[bool] = True
    takes_drafts: ClassVar[bool] = False
    unshareable: ClassVar[str | None] = "looks up what a piece of a prompt reads, so its keys are no other prompt's"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if UNIT % options.block_size:
            raise InputError(
                f"InfLLM looks up units of {UNIT} tokens, and KV blocks of {options.block_size} do not fill one",
                f"use a block_size that divides {UNIT}",
                field="block_size",
            )

    @property
    def units(self) -> int:
        return self.options.budget // UNIT

    @property
    def near(self) -> Seen:
        """What is read without being looked up."""
        return Seen(sinks=self.options.sinks, rolling=self.options.window)

    def beside(self, head_dim: int) -> int:
        return 4 + -(-REPRESENTATIVES * 4 * head_dim // self.options.block_size)
