"""MInference: long prompts are attended sparsely, each head by its own pattern (Jiang et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import ClassVar

from armillary.serve.kv_policies.policy import Backend, Dense, Options


class MInference(Dense):
    """Of a prompt longer than all of these together a query reads the first `sinks` tokens, the last `window`, and `budget` more
    by its head's pattern; answers read everything, and everything is kept.

    Patterns come from a file (`kernels.sparse_prefill.search` over a model's heads: `executors.pattern_search`), and are
    vertical-slash without one, which the paper finds for most heads. What exactly is read is found for each piece of a
    prompt from its own last queries, so a prompt's keys depend on the pieces that it was computed in.
    """

    name: ClassVar[str] = "minference"
    backends: ClassVar[tuple[Backend, ...]] = ("torch",)
    unshareable: ClassVar[str | None] = "chooses what a prompt reads by the prompt, so its keys are no other prompt's"

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self.patterns = options.patterns
