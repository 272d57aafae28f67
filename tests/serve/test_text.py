"""Streamed text equals the text decoded at once, whatever the cut, and stops where the first stop string begins."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models

from armillary.core.errors import InputError
from armillary.serve.text import TextStream

SPECIAL = 256


class Bytes:
    """A tokenizer of single bytes, and one special token."""

    def token_bytes(self, token: int) -> bytes:
        return b"<end>" if token == SPECIAL else bytes([token])

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return b"".join(self.token_bytes(i) for i in ids if not (skip_special and i == SPECIAL)).decode("utf-8", "replace")


class Pieces:
    """A SentencePiece-like tokenizer: a space before each word, dropped at the start of the text."""

    pieces = ("▁", "▁▁", "▁a", "b", "▁你", "好", "!", "a▁")

    def __init__(self) -> None:
        self._hf = HFTokenizer(models.WordLevel({piece: i for i, piece in enumerate(self.pieces)}, unk_token="!"))
        self._hf.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self._hf.add_special_tokens(["<s>"])

    def token_bytes(self, token: int) -> bytes:
        return b"<s>" if token == len(self.pieces) else self.pieces[token].replace("▁", " ").encode()

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        return self._hf.decode(list(ids), skip_special_tokens=skip_special)


def pushed(stream: TextStream, ids: Sequence[int]) -> list[str]:
    return [*(stream.push(token) for token in ids), stream.finish()]


@given(st.lists(st.integers(0, SPECIAL), max_size=40), st.booleans())
def test_pieces_add_up_to_the_decoded_whole(ids: list[int], skip_special: bool) -> None:
    assert "".join(pushed(TextStream(Bytes(), skip_special=skip_special), ids)) == Bytes().decode(ids, skip_special)


ONE = Bytes()


@given(st.lists(st.integers(0, SPECIAL), max_size=40), st.lists(st.integers(0, SPECIAL), max_size=40))
def test_streams_of_one_tokenizer_do_not_mix(first: list[int], second: list[int]) -> None:
    streams = TextStream(ONE), TextStream(ONE, skip_special=False)
    pieces = [(streams[0].push(a), streams[1].push(b)) for a, b in zip(first, second, strict=False)]
    pieces.append((streams[0].finish(), streams[1].finish()))
    least = len(pieces) - 1
    assert "".join(a for a, _ in pieces) == ONE.decode(first[:least])
    assert "".join(b for _, b in pieces) == ONE.decode(second[:least], skip_special=False)


@given(st.text(max_size=40))
def test_no_piece_ends_within_a_character(text: str) -> None:
    text = text.encode("utf-8", "replace").decode()
    encoded = text.encode()
    stream, seen = TextStream(Bytes()), ""
    for byte in encoded:
        seen += stream.push(byte)
        assert text.startswith(seen)
    assert seen + stream.finish() == text


@settings(deadline=None)
@given(st.lists(st.integers(0, len(Pieces.pieces)), max_size=12), st.booleans())
def test_the_leading_space_is_treated_as_decoding_does(ids: list[int], skip_special: bool) -> None:
    tokenizer = Pieces()
    assert "".join(pushed(TextStream(tokenizer, skip_special=skip_special), ids)) == tokenizer.decode(ids, skip_special)


def plainest(text: str, stops: Sequence[str], include: bool) -> str:
    """Read one character at a time; end where a stop string is complete."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[:end] if include else text[: end - max(map(len, found))]
    return text


@given(
    st.text("ab\n é", max_size=30),
    st.lists(st.text("ab\n é", min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(1, 6), min_size=40, max_size=40),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_the_cut_into_tokens(text: str, stops: list[str], sizes: list[int], include: bool) -> None:
    class Words:
        def __init__(self) -> None:
            data, self.words = text.encode(), list[bytes]()
            for size in sizes:
                self.words.append(data[:size])
                data = data[size:]
            self.words.append(data)

        def token_bytes(self, token: int) -> bytes:
            return self.words[token]

        def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
            return b"".join(self.words[i] for i in ids).decode("utf-8", "replace")

    words = Words()
    stream, wanted, seen = TextStream(words, stops, include_stop=include), plainest(text, stops, include), ""
    for token in range(len(words.words)):
        seen += stream.push(token)
        assert wanted.startswith(seen), "text that a stop string claims was let go"
    seen += stream.finish()
    assert seen == wanted
    assert stream.stopped == any(stop in text for stop in stops)


def test_nothing_follows_a_stop() -> None:
    stream = TextStream(Bytes(), ["END"])
    assert [stream.push(byte) for byte in b"xEND more"] == ["x", *[""] * 8]
    assert stream.finish() == ""
    assert stream.stop_string == "END"


def test_what_was_held_back_comes_at_the_end_and_no_later_than_needed() -> None:
    stream = TextStream(Bytes(), ["\n\nUser:"])
    assert [stream.push(byte) for byte in b"hi\n\nUs"] == ["h", "i", "", "", "", ""]
    assert stream.push(ord("!")) == "\n\nUs!"
    assert stream.push(ord("\n")) == ""
    assert stream.finish() == "\n"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(InputError, match="empty"):
        TextStream(Bytes(), ["a", ""])
