"""Tokens become text, a piece at a time: only what is certain, and nothing after a stop string."""

from __future__ import annotations

import codecs
import contextlib
import weakref
from collections.abc import Sequence
from typing import Protocol

from armillary.core.errors import InputError


class Detokeniser(Protocol):
    """What a text stream needs of a tokenizer."""

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str: ...

    def token_bytes(self, token: int) -> bytes: ...


class _Pieces(dict[int, str | bytes]):
    """What each token adds after the first that adds anything, found when it first comes: text, or bytes that are no whole characters."""

    def __init__(self, tokenizer: Detokeniser, skip_special: bool) -> None:
        self._tokenizer = weakref.ref(tokenizer)  # which is what the table is kept by
        self._skip_special = skip_special

    def __missing__(self, token: int) -> str | bytes:
        tokenizer = self._tokenizer()
        assert tokenizer is not None  # a stream has it
        piece = tokenizer.token_bytes(token)
        if self._skip_special and piece and _left_out(tokenizer, token):
            piece = b""
        self[token] = piece
        with contextlib.suppress(UnicodeDecodeError):
            self[token] = piece.decode()
        return self[token]


_tables: weakref.WeakKeyDictionary[Detokeniser, dict[bool, _Pieces]] = weakref.WeakKeyDictionary()


def _pieces_of(tokenizer: Detokeniser, skip_special: bool) -> _Pieces:
    """The table that all streams of a tokenizer share: with 256 sequences running, asking the tokenizer for each token took longer than all else."""
    tables = _tables.setdefault(tokenizer, {})
    return tables.setdefault(skip_special, _Pieces(tokenizer, skip_special))


def _left_out(tokenizer: Detokeniser, token: int) -> bool:
    """Whether decoding leaves a token out because it is special."""
    return tokenizer.decode([token], skip_special=True) == "" and tokenizer.decode([token], skip_special=False) != ""


class TextStream:
    """The text of one sequence of tokens, streamed.

    The pieces that `push` and `finish` return add up to `tokenizer.decode(tokens)`, cut before the first stop string (after
    it with `include_stop`). The first stop string is the one whose last character comes first, however the text was cut
    into tokens. A piece never ends within a UTF-8 character; text that may yet become a stop string is held back.

    Bytes that are no UTF-8 become U+FFFD, one for each maximal ill-formed part as Unicode recommends. (Tokenizers with byte
    fallback decode a run of byte tokens with one bad byte to U+FFFD throughout, which cannot be known while streaming.)
    """

    def __init__(self, tokenizer: Detokeniser, stop: Sequence[str] = (), *, include_stop: bool = False, skip_special: bool = True) -> None:
        if "" in stop:
            raise InputError("a stop string is empty", "give at least one character or leave it out", field="stop")
        self._tokenizer = tokenizer
        self._pieces = _pieces_of(tokenizer, skip_special)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begun = False
        self._within = False  # a character, of which the decoder has the first bytes
        self._held = ""
        self.stop_string: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string has appeared: nothing follows."""
        return self.stop_string is not None

    def push(self, token: int) -> str:
        """Take the next token and return the text that is now certain ("" when none is)."""
        if self.stop_string is not None:
            return ""
        piece = self._pieces[token] if self._begun else self._first(token)
        if self._within or isinstance(piece, bytes):
            piece = self._decoder.decode(piece if isinstance(piece, bytes) else piece.encode())
            self._within = self._decoder.getstate()[0] != b""
        return self._release(piece) if piece and self._stop else piece

    def finish(self) -> str:
        """No token follows: return what was held back. An incomplete character becomes U+FFFD."""
        if self.stopped:
            return ""
        last = self._decoder.decode(b"", final=True)
        text = (self._release(last) if self._stop else last) + self._held
        self._held = ""
        return text

    def _first(self, token: int) -> bytes:
        """What a token adds before which none has added anything."""
        piece = self._tokenizer.token_bytes(token)
        shown = self._tokenizer.decode([token], skip_special=self._skip_special)
        if self._skip_special and shown == "" and self._tokenizer.decode([token], skip_special=False) != "":
            return b""
        if piece:
            self._begun = True
            # SentencePiece marks the start of a word with a space; decoding drops it at the start of the text.
            if piece[:1] == b" " and piece[1:].decode("utf-8", "replace") == shown:
                return piece[1:]
        return piece

    def _release(self, piece: str) -> str:
        """Add `piece` to the text and return the part of what is held that no stop string can claim any more."""
        text, fresh = self._held + piece, len(self._held)
        found = self._first_stop(text, fresh)
        if found is not None:
            start, self.stop_string = found
            self._held = ""
            return text[: start + len(self.stop_string)] if self._include_stop else text[:start]
        keep = self._may_become_stop(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _first_stop(self, text: str, fresh: int) -> tuple[int, str] | None:
        """Start and name of the stop string that ends first in `text`, of those that end after `fresh`; the longest if several do."""
        matches = []
        for stop in self._stop:
            start = text.find(stop, max(0, fresh - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if not matches:
            return None
        _, start, stop = min(matches)
        return start, stop

    def _may_become_stop(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop string."""
        longest = max(map(len, self._stop)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stop):
                return length
        return 0
