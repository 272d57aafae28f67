"""Prepared folders: nothing lost between text and tokens, no text on both sides of the split, nothing half done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.data.batches import IGNORE, BatchStream
from armillary.data.prepare import prepare_chats, prepare_text, split_documents
from armillary.data.shards import TokenShards
from armillary.models.tokenizer import Tokenizer

TEXTS = [f"Document {n}: the {'very ' * (n % 7)}same <|endoftext|> spheres 🙂 turn {n * n} times.\n" for n in range(30)]


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*TEXTS, "  "]))
    return [path]


@pytest.mark.parametrize("learn", [True, False])
def test_every_text_comes_back_from_exactly_one_split(learn: bool, files: list[Path], tmp_path: Path, tokenizer: Tokenizer) -> None:
    chosen = {"vocabulary": 280} if learn else {"tokenizer": tokenizer}
    made = prepare_text(files, tmp_path / "out", validation=0.2, seed=3, **chosen)  # type: ignore[arg-type]
    read = Tokenizer.from_json(tmp_path / "out" / "tokenizer")
    found: dict[str, list[str]] = {}
    for split in ("train", "validation"):
        shards = TokenShards.open(tmp_path / "out", split)
        documents = [shards.document(i).tolist() for i in range(shards.documents)]
        # A control token written in a text is text: the end of a document is its last token and no other.
        assert all(document.index(read.eos) == len(document) - 1 for document in documents)
        found[split] = [read.decode(document) for document in documents]
    assert sorted(found["train"] + found["validation"]) == sorted(TEXTS)
    held = sum(map(len, found["validation"])) / sum(map(len, TEXTS))
    assert 0.1 < held <= 0.2
    assert made.train.source["sha256"] == made.validation.source["sha256"] if made.validation else False


def test_a_failure_leaves_nothing(files: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="outside 257"):
        prepare_text(files, tmp_path / "out", vocabulary=10)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["texts.jsonl"]


def test_duplicates_are_on_no_side(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [TEXTS[0]] * 20 + ["something else altogether, and long enough"]))
    made = prepare_text([path], tmp_path / "out", tokenizer=tokenizer, duplicates_from=0.7)
    assert made.duplicates is not None
    assert len(made.duplicates.removed) == 19
    assert (made.train.documents, made.validation.documents if made.validation else 0) == (1, 1)


def test_chats_keep_which_tokens_are_the_assistants(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "chats.jsonl"
    chats = [[{"role": "user", "content": f"number {n}?"}, {"role": "assistant", "content": f"it is {n}"}] for n in range(8)]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template = "{% for m in messages %}<|im_start|>{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    prepare_chats([path], tmp_path / "out", tokenizer=tokenizer, template=template, validation=0.3)
    read = Tokenizer.from_json(tmp_path / "out" / "tokenizer")
    assert read.chat_template == template
    learnt = []
    for split in ("train", "validation"):
        for batch in BatchStream(TokenShards.open(tmp_path / "out", split), rows=1, length=256, packing="documents", epochs=1):
            kept = batch.targets[batch.targets != IGNORE].tolist()
            learnt += read.decode(kept, skip_special=False).split("<|im_end|>")[:-1]
    assert sorted(learnt) == [f"it is {n}" for n in range(8)]
    with pytest.raises(InputError, match="has no chat template"):
        prepare_chats([path], tmp_path / "none", tokenizer=tokenizer)


@given(st.lists(st.integers(0, 1000), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 2**32))
def test_the_split_holds_out_at_most_its_share(lengths: list[int], share: float, seed: int) -> None:
    held = split_documents(lengths, share, seed)
    assert held == split_documents(lengths, share, seed)
    assert 1 <= sum(held) < len(lengths)
    out = sum(length for length, is_out in zip(lengths, held, strict=True) if is_out)
    assert out <= share * sum(lengths) or sum(held) == 1


def test_one_document_cannot_be_split() -> None:
    assert split_documents([5], 0, 0) == [False]
    with pytest.raises(InputError, match=r"1 document is too few to hold out 10%: .*--validation 0"):
        split_documents([5], 0.1, 0)
