"""A tokenizer learnt from a few sentences, and folders of shards made with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from armillary.data.bpe import train_bpe
from armillary.data.shard_writer import TokenDocument, write_shards
from armillary.data.shards import TokenShards
from armillary.models.tokenizer import Tokenizer

SENTENCES = [
    "the spheres turn within the spheres, and the stars keep their places",
    "a ring for the sun, a ring for the moon, and rings for the wandering stars",
    "whoever moves the brass band moves the heavens that it stands for",
] * 3

Shards = Callable[..., TokenShards]


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_bpe(SENTENCES, tmp_path_factory.mktemp("bpe"), vocabulary=300, special=["<|endoftext|>", "<|im_start|>", "<|im_end|>"])


@pytest.fixture
def make_shards(tmp_path: Path, tokenizer: Tokenizer) -> Shards:
    """Documents of the given lengths; document d's tokens are d*1000 + place, modulo the vocabulary, so that rows can be told apart."""

    def make(lengths: list[int], name: str = "shards", flags: bool = False, **options: object) -> TokenShards:
        documents: list[TokenDocument] = []
        for number, length in enumerate(lengths):
            tokens = (np.arange(length) + 1000 * number) % tokenizer.vocab_size
            documents.append(TokenDocument(tokens, tokens % 3 == 0 if flags else None))
        write_shards(tmp_path / name, documents, tokenizer=tokenizer, **options)  # type: ignore[arg-type]
        return TokenShards.open(tmp_path / name)

    return make
