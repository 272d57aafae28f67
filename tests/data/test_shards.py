"""Shards: what is written is what is read, and damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.data.bpe import train_bpe
from armillary.data.shard_writer import TokenDocument, write_shards
from armillary.data.shards import TokenShards
from armillary.data.tokenizer_identity import require_tokenizer, tokenizer_identity
from armillary.models.tokenizer import Tokenizer


@given(documents=st.lists(st.lists(st.integers(0, 299), max_size=30), min_size=1, max_size=12), bound=st.integers(1, 40), eos=st.booleans())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_documents_come_back(
    documents: list[list[int]], bound: int, eos: bool, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> None:
    end = 0 if eos else None
    expected = [[*d, 0] if eos and d[-1] != 0 else d for d in documents if d]
    folder = tmp_path_factory.mktemp("law") / "shards"
    if not expected:
        with pytest.raises(InputError, match="no document"):
            write_shards(folder, documents, tokenizer=tokenizer)
        assert list(folder.parent.iterdir()) == []
        return
    manifest = write_shards(folder, documents, tokenizer=tokenizer, eos=end, shard_tokens=bound)
    shards = TokenShards.open(folder)
    assert shards.manifest == manifest
    assert [shards.document(i).tolist() for i in range(shards.documents)] == expected
    assert (shards.tokens, shards.lengths.tolist()) == (sum(map(len, expected)), list(map(len, expected)))
    assert all(file.tokens <= max(bound, *map(len, expected)) for file in manifest.shards)


def test_flags_come_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    documents = [TokenDocument([5, 6, 7], [False, True, True]), TokenDocument([8, 9], [True, False])]
    write_shards(tmp_path / "s", documents, tokenizer=tokenizer, eos=0, shard_tokens=4)
    shards = TokenShards.open(tmp_path / "s")
    assert [shards.scored(i).tolist() for i in (0, 1)] == [[0, 1, 1, 1], [1, 0, 0]]
    assert [shards.document(i).tolist() for i in (0, 1)] == [[5, 6, 7, 0], [8, 9, 0]]


def test_four_bytes_where_two_are_too_few(tmp_path: Path) -> None:
    class Wide:
        vocab_size = 70_000

        class backend:
            @staticmethod
            def encode(text: str, add_special_tokens: bool) -> object:
                return type("Encoding", (), {"ids": [len(text)]})

        @staticmethod
        def token_bytes(token: int) -> bytes:
            return b"%d" % token

    manifest = write_shards(tmp_path / "s", [[69_999, 1]], tokenizer=Wide())  # type: ignore[arg-type]
    assert manifest.dtype == "uint32"
    assert TokenShards.open(tmp_path / "s").document(0).tolist() == [69_999, 1]


def test_a_failure_leaves_nothing_and_an_existing_folder_is_kept(tmp_path: Path, tokenizer: Tokenizer) -> None:
    def broken() -> object:
        yield [1, 2]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_shards(tmp_path / "s", broken(), tokenizer=tokenizer)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    write_shards(tmp_path / "s", [[1, 2]], tokenizer=tokenizer)
    with pytest.raises(InputError, match="exists already"):
        write_shards(tmp_path / "s", [[3]], tokenizer=tokenizer)
    assert TokenShards.open(tmp_path / "s").document(0).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([1, 300], r"document 1 holds token 300; the vocabulary has 300"),
        ([-1], r"token -1"),
        ([0.5], "type float64"),
        (TokenDocument([1, 2], [True]), "flags of shape"),
        (TokenDocument([1], [True]), "unlike those before it"),
    ],
)
def test_bad_documents_are_refused_by_number(document: object, message: str, tmp_path: Path, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=message):
        write_shards(tmp_path / "s", [[1], document], tokenizer=tokenizer)  # type: ignore[list-item]


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    write_shards(tmp_path / "s", [[1, 2, 3], [4, 5], [6]], tokenizer=tokenizer, shard_tokens=4)
    return tmp_path / "s"


def test_a_flipped_bit_is_found_and_named(folder: Path) -> None:
    path = folder / "tokens-00000.bin"
    damaged = bytearray(path.read_bytes())
    damaged[1] ^= 0x80
    path.write_bytes(damaged)
    with pytest.raises(FormatError, match=r"tokens-00000.bin is damaged"):
        TokenShards.open(folder)
    # Unverified, the id that it made is still no index into an embedding.
    with pytest.raises(FormatError, match=r"document 0 holds token 32,769"):
        TokenShards.open(folder, verify=False).document(0)


def test_a_short_or_missing_file_is_named(folder: Path) -> None:
    path = folder / "tokens-00001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(FormatError, match=r"tokens-00001.bin has 4 bytes; the manifest says 6"):
        TokenShards.open(folder)
    path.unlink()
    with pytest.raises(FormatError, match=r"tokens-00001.bin is missing"):
        TokenShards.open(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "megatron"}, "not a manifest of token shards"),
        ({"version": 2}, "this Armillary reads 1"),
        ({"tokens": 7}, "contradict"),
        ({"tokens": 1 << 60}, "not an integer in"),
        ({"documents": True}, "not an integer in"),
        ({"dtype": "float32"}, "uint16 and uint32"),
        ({"shards": [{"name": "../../etc/passwd", "tokens": 1, "bytes": 2, "sha256": ""}]}, "not the name of a file"),
        ({"shards": "tokens"}, "not a list of files"),
    ],
)
def test_a_foreign_manifest_is_refused(change: dict[str, object], message: str, folder: Path) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(FormatError, match=message):
        TokenShards.open(folder)


def test_offsets_that_do_not_cover_the_tokens_are_refused(folder: Path) -> None:
    np.array([0, 3, 3, 6], dtype="<i8").tofile(folder / "documents.bin")
    with pytest.raises(FormatError, match="do not cover"):
        TokenShards.open(folder, verify=False)
    np.array([0, 2, 5, 6], dtype="<i8").tofile(folder / "documents.bin")
    with pytest.raises(FormatError, match="across two shards"):
        TokenShards.open(folder, verify=False)


def test_a_folder_without_shards_says_what_to_do(folder: Path) -> None:
    with pytest.raises(NotFoundError, match="armillary data prepare"):
        TokenShards.open(folder.parent / "nothing")
    with pytest.raises(NotFoundError, match=r"it has the splits s: name one"):
        TokenShards.open(folder.parent)
    assert TokenShards.open(folder.parent, "s").documents == 3


def test_the_order_is_a_permutation_by_seed_and_epoch(folder: Path) -> None:
    shards = TokenShards.open(folder)
    assert_array_equal(shards.order(3, 1), shards.order(3, 1))
    assert {tuple(sorted(shards.order(seed, epoch))) for seed in range(5) for epoch in range(5)} == {(0, 1, 2)}
    assert len({tuple(shards.order(0, epoch)) for epoch in range(20)}) > 1
    assert shards.order(7, 7, shuffle=False).tolist() == [0, 1, 2]


def test_identity_is_behaviour(tmp_path: Path, tokenizer: Tokenizer) -> None:
    from armillary.models.hf_tokenizer import write_tokenizer

    (tmp_path / "copy").mkdir()
    write_tokenizer(tokenizer, tmp_path / "copy")
    assert tokenizer_identity(Tokenizer.from_json(tmp_path / "copy")) == tokenizer_identity(tokenizer)
    other = train_bpe(["another text altogether"], tmp_path / "other", vocabulary=270)
    require_tokenizer(tokenizer_identity(tokenizer), tokenizer, "data")
    with pytest.raises(InputError, match=r"data was tokenized by another tokenizer \(identity "):
        require_tokenizer(tokenizer_identity(tokenizer), other, "data")
