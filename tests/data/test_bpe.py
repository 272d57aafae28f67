"""A learnt vocabulary loses nothing, is the same every time, and is a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.data.bpe import train_bpe
from armillary.data.tokenizer_identity import tokenizer_identity
from armillary.models.tokenizer import Tokenizer

TEXTS = ["the spheres turn within the spheres", "the stars keep their places"] * 4


@given(text=st.text(max_size=60))
def test_any_text_comes_back(text: str, tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode(text, special=False), skip_special=False) == text
    assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text, special=False))) == text.encode()


def test_special_tokens_come_first_and_the_first_ends_a_text(tokenizer: Tokenizer) -> None:
    assert [tokenizer.id_of(name) for name in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")] == [0, 1, 2]
    assert tokenizer.eos == 0
    assert tokenizer.special_ids == {0, 1, 2}
    assert tokenizer.vocab_size == 300
    assert len(tokenizer.encode("the spheres")) < len("the spheres") / 2


def test_a_run_without_a_break_takes_no_squared_time_and_comes_back(tmp_path: Path) -> None:
    run = "a" * 3_000_000  # learnt as one word it takes hours, in which no signal is heard
    learnt = train_bpe([run, *TEXTS], tmp_path / "t", vocabulary=300)
    ids = learnt.encode(run, special=False)
    assert len(ids) < len(run) / 500
    assert learnt.decode(ids) == run


def test_the_same_texts_give_the_same_tokenizer(tmp_path: Path) -> None:
    first, second = (train_bpe(iter(TEXTS), tmp_path / name, vocabulary=290) for name in "ab")
    assert tokenizer_identity(first) == tokenizer_identity(second)
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()


def test_transformers_reads_the_folder_alike(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    ours = train_bpe(
        TEXTS, tmp_path / "t", vocabulary=280, special=["<|endoftext|>", "<|im_start|>"], chat_template="{{ messages[0].content }}"
    )
    theirs = AutoTokenizer.from_pretrained(str(tmp_path / "t"))
    text = "The stars turn  <|im_start|>\n naïve 🙂"
    assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.eos_token_id, theirs.chat_template) == (ours.eos, ours.chat_template)


def test_what_cannot_be_learnt_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a vocabulary of 100 is outside 257"):
        train_bpe(TEXTS, tmp_path / "t", vocabulary=100)
    with pytest.raises(InputError, match="no text to learn"):
        train_bpe([], tmp_path / "t", vocabulary=300)
    train_bpe(TEXTS, tmp_path / "t", vocabulary=260)
    with pytest.raises(InputError, match="holds a tokenizer already"):
        train_bpe(TEXTS, tmp_path / "t", vocabulary=260)
