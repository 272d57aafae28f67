"""Where one sequence stands in its grammar: which tokens may come next, with drafts and without."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from armillary.core.errors import ArmillaryError, InputError
from armillary.kernels.token_mask import allows
from armillary.serve.grammar.grammar import Grammar

MASK_SECONDS = 0.1  # of the processor, for what may come next
SLOW_MASKS = 4  # how many may take longer before the answer is given up: everybody else's iteration waits for each


class Matcher:
    """A `Request.constraint`. Only `accept` moves it: the engine calls it once for each token that it appends to the answer.

    A grammar that reads the same text in many ways (nested parts that may all be empty) takes up to a second a token to follow. Such a
    walk ends with an InputError from `accept`, which ends its request alone.
    """

    def __init__(self, matcher: Any, vocab_size: int, stops: Tensor, grammar: Grammar) -> None:
        """`stops`: int32 [ceil(vocab / 32)], the bits of the tokens that end a text. `grammar`: what is followed, for who has to follow it elsewhere."""
        self.grammar = grammar
        self._matcher = matcher
        self._words = -(-vocab_size // 32)
        self._stops = stops
        self._slow = 0

    @property
    def finished(self) -> bool:
        """Whether nothing can follow: the answer has been ended by a stop token, or only one may come."""
        if self._matcher.is_terminated():
            return True
        if not self._matcher.is_completed():
            return False
        return not bool((self.mask()[0] & ~self._stops).any())

    @property
    def complete(self) -> bool:
        """Whether the answer may end here."""
        return bool(self._matcher.is_completed())

    def mask(self, drafts: Sequence[int] = ()) -> Tensor:
        """What may come next, and after each of `drafts`: int32 [1 + drafts, ceil(vocab / 32)], bit j % 32 of word j // 32 for token j.

        Tokens that end a text are allowed where the grammar is complete, and nowhere else. Behind a draft that the grammar
        does not allow (which the row before says) everything is allowed, for nothing is drawn there.
        """
        rows = torch.full((1 + len(drafts), self._words), -1, dtype=torch.int32)
        taken = 0
        try:
            for row in range(1 + len(drafts)):
                if self._matcher.is_terminated():
                    break
                self._fill(rows, row)
                if row == len(drafts) or not allows(rows[row], drafts[row]) or not self._matcher.accept_token(drafts[row]):
                    break
                taken += 1
        finally:
            if taken:
                self._matcher.rollback(taken)
        return rows

    def accept(self, token: int) -> None:
        """The answer goes on with `token`. Raises ArmillaryError for one that the grammar does not allow here, InputError as above."""
        if self.slow:
            raise slow(self.grammar)
        if not self._matcher.accept_token(token):
            raise ArmillaryError(
                f"token {token} does not follow the grammar of this request", "this is a defect of the engine: please report it"
            )

    def follows(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, from the first, may come in turn."""
        taken = 0
        row = torch.empty((1, self._words), dtype=torch.int32)
        for token in tokens:
            if self._matcher.is_terminated():
                break
            self._fill(row, 0)
            if not allows(row[0], token) or not self._matcher.accept_token(token):
                break
            taken += 1
        if taken:
            self._matcher.rollback(taken)
        return taken

    @property
    def slow(self) -> bool:
        """Whether the grammar has taken too long too often."""
        return self._slow >= SLOW_MASKS

    def _fill(self, rows: Tensor, row: int) -> None:
        begin = time.thread_time()
        self._matcher.fill_next_token_bitmask(rows, row)
        self._slow += time.thread_time() - begin > MASK_SECONDS

    def forced(self) -> bytes:
        """The text that must come next, whatever the model thinks: empty where it has a choice."""
        try:
            text = "" if self._matcher.is_terminated() else self._matcher.find_jump_forward_string()
        except UnicodeDecodeError as error:  # it ends within a character, whose first bytes alone are forced
            return bytes(error.object)
        return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")

    def fork(self) -> Matcher:
        """Another walk from where this one stands."""
        copy = object.__new__(Matcher)
        copy._matcher, copy._words, copy._stops, copy.grammar = self._matcher.fork(), self._words, self._stops, self.grammar
        copy._slow = self._slow
        return copy


def slow(grammar: Grammar) -> InputError:
    """What is told of a grammar that cannot be followed fast enough."""
    return InputError(
        f"{grammar.field}: to say what may come next takes over {1000 * MASK_SECONDS:g} ms a token, because the same text can be read in many ways",
        "write it so that a text can be read in one way: no parts that may be empty within each other, no rule that begins with itself twice",
        field=grammar.field,
    )
