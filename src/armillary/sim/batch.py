"""What an iteration of a decoder computes, as far as its cost depends on it."""

from __future__ import annotations

from armillary.core.values import value


@value
class Read:
    """What attention reads under a policy by which it does not read everything: pairs of a prompt's query and a key, keys of prompts, keys of decodes."""

    prompt_pairs: int
    prompt_keys: int
    decode_keys: int


@value
class Batch:
    """`prompts`: of each piece of a prompt (query, cached): `query` new tokens that follow `cached` computed ones.

    `decodes` sequences compute one token each, after `cached` tokens in all. `sampled`: how many next tokens are drawn. `read`: what layers without
    a window of their own read instead of everything.
    """

    prompts: tuple[tuple[int, int], ...] = ()
    decodes: int = 0
    cached: int = 0
    sampled: int = 0
    read: Read | None = None

    @property
    def prompt_tokens(self) -> int:
        return sum([query for query, _ in self.prompts]) if self.prompts else 0

    @property
    def tokens(self) -> int:
        """All that go through the linear layers."""
        return self.prompt_tokens + self.decodes

    @property
    def sequences(self) -> int:
        return len(self.prompts) + self.decodes
