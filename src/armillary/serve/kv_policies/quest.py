"""Quest: a drawn token reads the pages of its context that matter to it (Tang et al., ICML 2024)."""

from __future__ import annotations

from typing import ClassVar

from armillary.core.errors import InputError
from armillary.kernels.seen import PAGE, Seen, page_bound_bytes
from armillary.serve.kv_policies.policy import Backend, Dense, Options


class Quest(Dense):
    """Nothing is given back. Of each key/value head `budget` / 16 pages are read, in all layers but the first `dense_layers`:
    the first, the last quarter of them, and of the others those whose keys could score highest; prompts are computed with
    everything.

    The paper always reads the last page only. Neighbours and the first tokens are worth more than what they displace: at 8k
    tokens a budget of 512 adds 6 to 12 % to SmolLM2's perplexity instead of 23 to 37 (bench/quest_quality.py).

    What the prefix cache keeps ends with the prompt: an answer's keys come from queries that did not read all, so as a later
    prompt's they would not be what that prompt gives alone.
    """

    name: ClassVar[str] = "quest"
    backends: ClassVar[tuple[Backend, ...]] = ("native",)

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        if options.block_size % PAGE:
            raise InputError(
                f"Quest selects pages of {PAGE} tokens, and a KV block of {options.block_size} is not whole pages",
                f"use a block_size that is a multiple of {PAGE}",
                field="block_size",
            )
        if options.budget < 2 * PAGE:
            raise InputError(
                f"kv_budget {options.budget} is less than the query's own page and one that it selects",
                f"give at least {2 * PAGE} tokens",
                field="kv_budget",
            )

    @property
    def seen(self) -> Seen:
        pages = self.options.budget // PAGE
        return Seen(pages, first_pages=int(pages > 2), last_pages=max(1, pages // 4), dense_layers=self.options.dense_layers)

    def beside(self, head_dim: int) -> int:
        return -(-page_bound_bytes(head_dim) // PAGE)

    def shareable(self, prompt: int, computed: int) -> int:
        return min(prompt, computed)
