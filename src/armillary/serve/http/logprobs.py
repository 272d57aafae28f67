"""Log-probabilities as the API writes them: for chat, token by token with bytes; for completions, in four columns."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from armillary.serve.request import TokenLogprob

if TYPE_CHECKING:
    from armillary.models.tokenizer import Tokenizer

FLOOR = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is not whole UTF-8 by itself as `bytes:\\xe2\\x82`."""
    raw = tokenizer.token_bytes(token)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float | None) -> float:
    return FLOOR if logprob is None else max(logprob, FLOOR)


def chat_entry(tokenizer: Tokenizer, scored: TokenLogprob) -> dict[str, Any]:
    """One element of `logprobs.content`."""

    def named(token: int, logprob: float | None) -> dict[str, Any]:
        return {"token": token_name(tokenizer, token), "logprob": finite(logprob), "bytes": list(tokenizer.token_bytes(token))}

    return {**named(scored.token, scored.logprob), "top_logprobs": [named(token, logprob) for token, logprob in scored.top]}


class CompletionColumns:
    """`tokens`, `token_logprobs`, `top_logprobs` and `text_offset` of one choice, filled as tokens come.

    `echo` is the prompt's text when it is part of the answer; `text_offset` counts characters from its start.
    """

    def __init__(self, tokenizer: Tokenizer, echo: str = "") -> None:
        self._tokenizer = tokenizer
        self._echo = echo
        self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def prompt(self, tokens: Sequence[int], scores: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """The prompt's columns. `scores[i]` belongs to `tokens[i]`; the first token has none."""
        rows: list[tuple[Any, ...]] = []
        for token, scored in zip(tokens, scores, strict=True):
            piece = self._tokenizer.token_bytes(token)
            if token in self._tokenizer.special_ids and not self._echo.startswith(piece.decode("utf-8", "replace"), self._offset):
                piece = b""  # added by the tokenizer, not part of the text
            elif not rows and piece[:1] == b" " and not self._echo.startswith(" "):
                piece = piece[1:]
            rows.append(self._row(token, scored, piece))
        self._offset = len(self._echo)
        self._decoder.reset()
        return _columns(rows)

    def output(self, scored: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
        return _columns([self._row(entry.token, entry, self._tokenizer.token_bytes(entry.token)) for entry in scored])

    def _row(self, token: int, scored: TokenLogprob | None, piece: bytes) -> tuple[Any, ...]:
        offset = self._offset
        self._offset += len(self._decoder.decode(piece))
        name = token_name(self._tokenizer, token)
        if scored is None or scored.logprob is None:
            return name, None, None, offset
        top = {token_name(self._tokenizer, other): finite(logprob) for other, logprob in scored.top}
        return name, finite(scored.logprob), {**top, name: finite(scored.logprob)}, offset


def _columns(rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


def join(first: dict[str, list[Any]] | None, second: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return second if first is None else {name: [*first[name], *second[name]] for name in second}
