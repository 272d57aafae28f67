"""What a grammar leaves no choice about is drafted: brackets, keys and quotes are verified together instead of drawn one by one.

SGLang's jump-forward decoding (Zheng et al., NeurIPS 2024) appends such text and cuts the answer into tokens anew. Here its tokens are
drafts like any others, verified by the draw, so an answer has the same tokens as without. Where nothing is forced, another drafter may
propose, and what the grammar would not let through is not shown to the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from armillary.serve.grammar.matcher import Matcher
from armillary.serve.request import Request

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer
    from armillary.serve.speculation.drafter import Drafter


class JumpForward:
    """A `Drafter` in front of another, or alone."""

    def __init__(self, tokenizer: Tokenizer, behind: Drafter | None = None) -> None:
        self.name = "grammar" if behind is None else f"grammar, {behind.name}"
        self._tokenizer = tokenizer
        self._behind = behind
        self._forced: set[str] = set()  # requests whose drafts of this iteration are the grammar's
        self._drafted = self._accepted = 0

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        proposed = [self._tokens(request)[:bound] for request, bound in zip(requests, most, strict=True)]
        self._forced = {request.id for request, tokens in zip(requests, proposed, strict=True) if tokens}
        if self._behind is not None:
            free = [index for index, tokens in enumerate(proposed) if not tokens]
            drafts = self._behind.propose([requests[index] for index in free], [most[index] for index in free])
            for index, tokens in zip(free, drafts, strict=True):
                constraint = requests[index].constraint
                proposed[index] = tokens[: constraint.follows(tokens)] if tokens and isinstance(constraint, Matcher) else tokens
        return proposed

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        if self._behind is None or request.id in self._forced:
            return ()
        return self._behind.laws(request)[: len(request.drafts)]

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        if request.id in self._forced:
            self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted
        elif self._behind is not None:
            self._behind.verified(request, drafted, accepted)

    def ran(self, tokens: int, duration: int) -> None:
        if self._behind is not None:
            self._behind.ran(tokens, duration)

    def forget(self, request: Request) -> None:
        self._forced.discard(request.id)
        if self._behind is not None:
            self._behind.forget(request)

    def state(self) -> dict[str, Any]:
        """For people who watch: tokens that grammars forced, and those of them that the model cut text into likewise."""
        return {"forced": self._drafted, "accepted": self._accepted}

    def _tokens(self, request: Request) -> tuple[int, ...]:
        text = request.constraint.forced() if isinstance(request.constraint, Matcher) else b""
        if not text:
            return ()
        tokens = self._tokenizer.encode(text.decode("utf-8", "ignore"), special=False)  # a character may be forced in part
        written = b"".join(map(self._tokenizer.token_bytes, tokens))
        return tuple(tokens) if text.startswith(written) else ()  # not where encoding adds a space
