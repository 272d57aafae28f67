"""Tokenizers: laws on tiny vocabularies that are trained here, and the ids that llama.cpp gives for the real model."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError
from armillary.models.gguf.pretokenizer import KINDS
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.vocabulary import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED
from armillary.models.gguf.writer import write_file
from armillary.models.load import LoadedModel
from armillary.models.tokenizer import Tokenizer

CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a schedule is data; data is a schedule",
    "don't we're 12345 67",
    "naïve café über",
] * 3
CONTROLS = ["<|end|>", "<|start|>"]
ANY_TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=60)
TRICKY = [
    "",
    " ",
    "  a",
    "a  ",
    "\n\n x",
    "\u00a0\u2003",
    "e\u0301",
    "日本語",
    "🏳️\u200d🌈",
    "\x00\x7f",
    "\U0010ffff",
    "Ġ",
    "<0x41>",
    "[UNK]",
]


def byte_level_metadata(kind: str = "gpt-2") -> dict[str, Any]:
    """A small byte-level BPE as GGUF stores it, with two control tokens at its end."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(backend.to_str())["model"]
    tokens = [token for token, _ in sorted(model["vocab"].items(), key=lambda entry: entry[1])] + CONTROLS
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": kind,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array([NORMAL] * (len(tokens) - 2) + [CONTROL] * 2, np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": len(tokens) - 1,
        "tokenizer.ggml.eos_token_id": len(tokens) - 2,
    }


def sentencepiece_metadata(space_prefix: bool = True) -> dict[str, Any]:
    """A small SentencePiece-like vocabulary: unknown, bos, eos, the 256 bytes, characters, and words scored by rank."""
    words = [
        "▁t",
        "he",
        "▁the",
        "▁a",
        "▁▁",
        "▁▁▁▁",
        "da",
        "ta",
        "data",
        "▁data",
        "is",
        "▁is",
        "ed",
        "ul",
        "che",
        "ule",
        "sched",
        "schedule",
    ]
    characters = sorted({*"▁abcdefghijklmnopqrstuvwxyz.,;'"})
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words, *characters, "<turn>"]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * (len(words) + len(characters)) + [USER_DEFINED]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + [-float(rank) for rank in range(len(pieces) - 259)], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": space_prefix,
    }


def from_metadata(metadata: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_gguf(GGUFFile(Path("test.gguf"), 3, metadata, {}, 0))


BYTES = from_metadata(byte_level_metadata())
PIECES = from_metadata(sentencepiece_metadata())
PLAIN_PIECES = from_metadata(sentencepiece_metadata(space_prefix=False))
ALL = {"byte-level": BYTES, "pieces": PIECES, "pieces without prefix": PLAIN_PIECES}


def plain_sentencepiece(text: str, metadata: dict[str, Any]) -> list[int]:
    """The plainest loop: merge the neighbours whose union scores best, the leftmost of equals, until none is a token."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    ids = {token: index for index, token in enumerate(tokens) if kinds[index] == NORMAL}
    text = text.replace(" ", "▁")
    symbols = list("▁" + text if metadata["tokenizer.ggml.add_space_prefix"] and text else text)
    while True:
        scores = metadata["tokenizer.ggml.scores"]
        unions = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in ids]
        if not unions:
            break
        _, at = min(unions)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    return [index for symbol in symbols for index in ([ids[symbol]] if symbol in ids else [3 + byte for byte in symbol.encode()])]


# -- laws -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=150)
@given(text=ANY_TEXT)
def test_decoding_gives_the_text_back(name: str, text: str) -> None:
    tokenizer = ALL[name]
    if name != "byte-level":
        text = text.replace("▁", " ")  # SentencePiece's own sign for a space
    ids = tokenizer.encode(text, special=False)
    assert tokenizer.decode(ids, skip_special=False) == text
    joined = b"".join(map(tokenizer.token_bytes, ids)).decode()
    assert joined == (f" {text}" if name == "pieces" and text else text)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("text", TRICKY)
def test_tricky_texts_come_back(name: str, text: str) -> None:
    assert ALL[name].decode(ALL[name].encode(text)) == text


@pytest.mark.parametrize("name", ALL)
@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_decoding_any_ids_equals_the_library(name: str, data: st.DataObject) -> None:
    tokenizer = ALL[name]
    # Not the byte tokens of pieces: of an incomplete character among them the library drops the whole run, we keep what is whole.
    first = 0 if name == "byte-level" else 259
    some = st.integers(first, tokenizer.vocab_size - 1).filter(lambda i: i not in tokenizer.special_ids)
    ids = data.draw(st.lists(some, max_size=12))
    assert tokenizer.decode(ids) == tokenizer.backend.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("the data is schedule a.é "), max_size=40), prefix=st.booleans())
def test_pieces_are_merged_as_sentencepiece_does(text: str, prefix: bool) -> None:
    tokenizer = PIECES if prefix else PLAIN_PIECES
    assert tokenizer.encode(text, special=False) == plain_sentencepiece(text, sentencepiece_metadata(prefix))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_pre_tokenizer_keeps_the_text(kind: str) -> None:
    tokenizer = from_metadata(byte_level_metadata(kind))
    for text in [*TRICKY, "I'LL say 1234567 things… in_a/path ½ ²"]:
        normal = text if tokenizer.backend.normalizer is None else tokenizer.backend.normalizer.normalize_str(text)
        assert tokenizer.decode(tokenizer.encode(text, special=False)) == normal


@pytest.mark.parametrize(("kind", "words"), [("smollm", "1 2 3 4"), ("qwen2", "1 2 3 4"), ("llama-bpe", "123 4"), ("gpt-2", "1234")])
def test_digits_are_split_as_the_kind_says(kind: str, words: str) -> None:
    splits = KINDS[kind].build().pre_tokenize_str("1234")
    assert [word for word, _ in splits] == words.split()


def test_control_tokens_are_single_ids_and_left_out_of_text() -> None:
    end = BYTES.id_of("<|end|>")
    ids = BYTES.encode("a<|end|>b", special=False)
    assert ids.count(end) == 1
    assert BYTES.decode(ids) == "ab"
    assert BYTES.decode(ids, skip_special=False) == "a<|end|>b"
    assert BYTES.token_bytes(end) == b"<|end|>"
    assert BYTES.stop_ids == {end}
    turn = PIECES.id_of("<turn>")
    assert turn in PIECES.encode("the <turn> data")
    assert "<turn>" in PIECES.decode(PIECES.encode("the <turn> data"))  # user-defined tokens are text


def test_bos_is_added_once() -> None:
    assert PIECES.encode("data")[0] == PIECES.bos
    assert PIECES.encode("<s>data").count(PIECES.bos) == 1
    assert PIECES.bos not in PIECES.encode("data", special=False)
    assert PIECES.encode("") == [PIECES.bos]
    assert BYTES.bos not in BYTES.encode("data")  # GPT-2's kind adds none unless the file says so
    flags = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    both = from_metadata(byte_level_metadata() | flags)
    assert both.encode("data") == [both.bos, *BYTES.encode("data"), both.eos]


def test_byte_tokens_are_their_bytes() -> None:
    assert PIECES.token_bytes(PIECES.id_of("<0xF0>")) == b"\xf0"
    assert b"".join(map(PIECES.token_bytes, PIECES.encode("é", special=False))) == " é".encode()


@pytest.mark.parametrize("text", ["\ud800", "ok \udfff"])
def test_lone_surrogates_are_refused(text: str) -> None:
    with pytest.raises(InputError, match=f"surrogate U.{ord(text[-1]):04X} at character {len(text) - 1}"):
        BYTES.encode(text)


def test_what_is_not_text_or_an_id_is_refused() -> None:
    with pytest.raises(InputError, match="type int"):
        BYTES.encode(5)  # type: ignore[arg-type]
    for token in (-1, BYTES.vocab_size):
        with pytest.raises(InputError, match="outside the vocabulary"):
            BYTES.token_bytes(token)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "bert"}, "'bert' is not supported"),
        ({"tokenizer.ggml.pre": "klingon"}, "'klingon' is not supported: choose a model with one of"),
        ({"tokenizer.ggml.tokens": None}, "'tokenizer.ggml.tokens' is missing"),
        ({"tokenizer.ggml.tokens": ["x" * 5000]}, "5,000 characters"),
        ({"tokenizer.ggml.merges": None}, "'tokenizer.ggml.merges' is missing"),
        ({"tokenizer.ggml.merges": ["a nosuchtoken"]}, "merge 0 .* not in the vocabulary"),
        ({"tokenizer.ggml.token_type": np.ones(3, np.int32)}, "'tokenizer.ggml.token_type'"),
        ({"tokenizer.ggml.eos_token_id": 10**6}, "eos_token_id is 1000000"),
        ({"tokenizer.ggml.add_bos_token": 1}, "not a boolean"),
    ],
)
def test_bad_vocabularies_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_metadata(byte_level_metadata() | changes)


def test_scores_must_be_finite() -> None:
    with pytest.raises(FormatError, match="finite number for each token"):
        from_metadata(sentencepiece_metadata() | {"tokenizer.ggml.scores": np.full(3, np.nan, np.float32)})


def test_a_file_without_a_pre_tokenizer_warns() -> None:
    with pytest.warns(UserWarning, match="does not name its pre-tokenizer"):
        from_metadata(byte_level_metadata() | {"tokenizer.ggml.pre": None})


def test_padded_vocabularies_keep_their_ids() -> None:
    metadata = byte_level_metadata()
    tokens = [*metadata["tokenizer.ggml.tokens"], "", "", "a", "a"]
    kinds = np.concatenate([metadata["tokenizer.ggml.token_type"], np.full(4, 5, np.int32)])
    padded = from_metadata(metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds})
    assert padded.vocab_size == BYTES.vocab_size + 4
    assert padded.encode("a fox") == BYTES.encode("a fox")


# -- tokenizer.json -------------------------------------------------------------------------------------------------


def folder_of(tmp_path: Path, backend: tokenizers.Tokenizer, **files: dict[str, Any]) -> Path:
    backend.save(str(tmp_path / "tokenizer.json"))
    for name, value in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    return tmp_path


def sentencepiece_json(kind: str) -> tokenizers.Tokenizer:
    """The three ways in which Hugging Face writes a SentencePiece model's spaces."""
    backend = tokenizers.Tokenizer.from_str(PIECES.backend.to_str())
    if kind == "metaspace":
        backend.normalizer = normalizers.Sequence([])
        backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    if kind == "no prefix":
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "no prefix"])
def test_json_with_pieces_equals_transformers(tmp_path: Path, kind: str) -> None:
    folder = folder_of(
        tmp_path, sentencepiece_json(kind), tokenizer_config={"bos_token": "<s>", "eos_token": {"content": "</s>"}},
        generation_config={"eos_token_id": [2, 5]},
    )  # fmt: skip
    ours = Tokenizer.from_json(folder)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    assert (ours.bos, ours.eos, ours.stop_ids) == (1, 2, {2, 5})
    for text in ["the data is a schedule", "é 日本", "a </s> b", "a  b\n", *CORPUS]:
        assert ours.encode(text) == theirs(text)["input_ids"]
        assert ours.encode(text, special=False) == theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ours.encode(text)) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=True)


def test_byte_level_json_equals_transformers(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path, BYTES.backend, tokenizer_config={"eos_token": "<|end|>"}, config={"eos_token_id": BYTES.id_of("<|start|>")}
    )
    ours = Tokenizer.from_json(folder / "tokenizer.json")
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>")
    assert ours.stop_ids == {BYTES.id_of("<|end|>"), BYTES.id_of("<|start|>")}
    assert ours.vocab_size == BYTES.vocab_size
    for text in [*TRICKY, *CORPUS, "a<|end|>b"]:
        assert ours.encode(text) == theirs(text)["input_ids"] == BYTES.encode(text)
        for skip in (True, False):
            assert ours.decode(ours.encode(text), skip) == theirs.decode(theirs(text)["input_ids"], skip_special_tokens=skip)


@pytest.mark.parametrize("where", ["file", "config", "list"])
def test_the_chat_template_is_found(tmp_path: Path, where: str) -> None:
    config: dict[str, Any] = {"chat_template": "plain"} if where == "config" else {}
    if where == "list":
        config = {"chat_template": [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "plain"}]}
    folder = folder_of(tmp_path, BYTES.backend, tokenizer_config=config)
    if where == "file":
        (folder / "chat_template.jinja").write_text("plain")
    assert Tokenizer.from_json(folder).chat_template == "plain"


def test_bad_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_json(tmp_path)
    for raw, message in [("{", "not JSON"), ("[]", "holds a list"), ("{}", "are inconsistent"), ("[" * 10**5, "not JSON")]:
        (tmp_path / "tokenizer.json").write_text(raw)
        with pytest.raises(FormatError, match=message):
            Tokenizer.from_json(tmp_path)
    words = tokenizers.Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    with pytest.raises(InputError, match="WordPiece"):
        Tokenizer.from_json(folder_of(tmp_path, words))


ANY_VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 2**40), st.floats(), st.text(max_size=8), st.lists(st.text(max_size=3), max_size=4),
    st.lists(st.integers(-5, 5), max_size=4).map(np.array), st.just(np.zeros(342, np.float32)), st.just(np.full(342, 9)),
)  # fmt: skip


@settings(deadline=None, max_examples=200)
@given(kind=st.sampled_from([byte_level_metadata(), sentencepiece_metadata()]), data=st.data())
def test_any_metadata_is_read_or_refused(kind: dict[str, Any], data: st.DataObject) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(sorted(kind)), ANY_VALUE, min_size=1, max_size=2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            tokenizer = from_metadata(kind | changes)
            tokenizer.decode(tokenizer.encode("the data"))
        except ArmillaryError:
            pass


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_json_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    raw = json.loads(sentencepiece_json("prepend").to_str())
    places = [
        raw,
        raw["model"],
        raw["decoder"],
        raw["decoder"]["decoders"][0],
        raw["normalizer"],
        raw["post_processor"],
        *raw["added_tokens"],
    ]
    value = st.one_of(st.none(), st.booleans(), st.integers(-1, 2**70), st.text(max_size=4), st.just([]), st.just({}), st.just([[]]))
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.sampled_from(places))
        place[data.draw(st.sampled_from(sorted(place)))] = data.draw(value)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    try:
        tokenizer = Tokenizer.from_json(tmp_path)
        tokenizer.decode(tokenizer.encode("the data"))
    except ArmillaryError:
        pass


def test_a_vocabulary_survives_a_gguf_file(tmp_path: Path) -> None:
    for tokenizer in (BYTES, PIECES):
        path = write_file(tmp_path / "v.gguf", tokenizer.gguf_metadata(), [])
        again = Tokenizer.from_gguf(GGUFFile.open(path))
        for text in [*TRICKY, *CORPUS]:
            assert again.encode(text) == tokenizer.encode(text)
        assert (again.bos, again.eos, again.stop_ids) == (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids)


@pytest.mark.parametrize(
    "kind", ["gpt-2", "smollm", "qwen2", "llama-bpe", "tekken", "gpt-4o", "deepseek-v3", "qwen35", "falcon", "default"]
)
def test_a_byte_level_json_is_written_as_gguf(tmp_path: Path, kind: str) -> None:
    backend = from_metadata(byte_level_metadata(kind)).backend
    config = {"eos_token": "<|end|>", "chat_template": "plain"}
    ours = Tokenizer.from_json(folder_of(tmp_path, backend, tokenizer_config=config, config={"eos_token_id": BYTES.id_of("<|start|>")}))
    metadata = ours.gguf_metadata()
    assert KINDS[metadata["tokenizer.ggml.pre"]] == KINDS[kind]
    path = write_file(tmp_path / "v.gguf", metadata, [])
    again = Tokenizer.from_gguf(GGUFFile.open(path))
    assert (again.eos, again.stop_ids, again.chat_template) == (ours.eos, ours.stop_ids, "plain")
    for text in [*TRICKY, *CORPUS, "a<|end|>b"]:
        assert again.encode(text) == ours.encode(text)


@pytest.mark.parametrize("kind", ["prepend", "no prefix"])
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(st.sampled_from("the data is schedule a.é "), max_size=40))
def test_a_json_with_pieces_is_written_as_gguf(tmp_path: Path, kind: str, text: str) -> None:
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    ours = Tokenizer.from_json(folder_of(tmp_path, sentencepiece_json(kind), tokenizer_config=config))
    again = from_metadata(ours.gguf_metadata())
    assert again.encode(text) == ours.encode(text)
    assert again.decode(again.encode(text)) == text


def test_a_json_that_gguf_would_change_is_refused(tmp_path: Path) -> None:
    # Metaspace puts a space before the first word only, GGUF also after each control token.
    ours = Tokenizer.from_json(folder_of(tmp_path, sentencepiece_json("metaspace"), tokenizer_config={"bos_token": "<s>"}))
    with pytest.raises(InputError, match=r"would encode .* differently"):
        ours.gguf_metadata()
    backend = tokenizers.Tokenizer.from_str(BYTES.backend.to_str())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("x", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    with pytest.raises(InputError, match="no name for the way"):
        Tokenizer.from_json(folder_of(tmp_path, backend)).gguf_metadata()
    three = {"eos_token_id": [5, 6, 7]}
    with pytest.raises(InputError, match="would be lost"):
        Tokenizer.from_json(folder_of(tmp_path, BYTES.backend, tokenizer_config={"eos_token": "<|end|>"}, config=three)).gguf_metadata()


# -- the real model -------------------------------------------------------------------------------------------------

# Ids that llama.cpp (llama-cpp-python 0.3.36) gives for SmolLM2.
GOLDEN: list[tuple[str, list[int]]] = [
    ("Hello, world!", [19556, 28, 905, 17]),
    ("  leading and   inner   spaces  ", [216, 2899, 284, 256, 6210, 256, 5600, 256]),
    ("tabs\tand\nnewlines\r\n\r\n\n", [100, 7366, 197, 397, 198, 2241, 5110, 7209, 1116]),
    (
        "1234567890 3.14159 \xb2\xb3 \xbd \u0663\u0664",
        [33, 34, 35, 36, 37, 38, 39, 40, 41, 32, 216, 35, 30, 33, 36, 33, 37, 41, 216, 19133, 39050, 216, 16738, 216, 164, 113, 164, 114],
    ),
    ("don't I'LL we've 'tis", [12420, 982, 339, 23, 16421, 392, 3543, 637, 34818]),
    ("na\xefve caf\xe9 \ufb01ne \xc5ngstr\xf6m", [3546, 46494, 37366, 40367, 662, 5549, 223, 863, 1321, 45682]),
    (
        "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8\u3001\u4e2d\u6587\u5b57\u7b26",
        [23274, 115, 40993, 179, 120, 248, 26453, 11100, 224, 10391, 251, 10391, 134, 11100, 226, 29917, 28589, 29184, 36518, 40562, 116],
    ),
    (
        "\U0001f389\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466\U0001f3f3\ufe0f\u200d\U0001f308",
        [
            10813,
            232,
            227,
            10813,
            235,
            119,
            321,
            231,
            10813,
            235,
            119,
            321,
            231,
            10813,
            235,
            117,
            321,
            231,
            10813,
            235,
            116,
            10813,
            233,
            128,
            31752,
            321,
            231,
            10813,
            230,
            226,
        ],
    ),
    (
        "\u043d\u043e\u0440\u043c\u0430\u043b\u044c\u043d\u044b\u0439 \u0442\u0435\u043a\u0441\u0442",
        [8831, 33175, 17868, 6511, 12681, 19884, 40942, 24958, 38106, 6643, 13760, 24674],
    ),
    ("def f(x):\n    return x**2  # c\n", [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34, 216, 907, 265, 198]),
    ("<|im_start|>user\nhi<|im_end|>\n", [1, 4093, 198, 6004, 2, 198]),
    ("a<|im_end|>b <|im_end|> c", [81, 2, 82, 216, 2, 265]),
    ("\xa0nbsp\u2003em\u200bzw", [15442, 94, 32093, 321, 221, 391, 321, 229, 106, 103]),
    ("e\u0301 combining \u0928\u093f", [85, 151, 219, 9301, 12335, 118, 27011]),
    ("\u0120\u010a \u0120", [143, 250, 143, 228, 24488, 250]),
    ("!!!???...---", [29646, 16693, 47, 2026, 5583]),
    ("\x00\x01\x7f", [190, 191, 217]),
    ("https://example.com/a?b=c&d=%20e", [4687, 1742, 7434, 30, 824, 31, 81, 47, 82, 45, 83, 22, 84, 23446, 34, 32, 85]),
    ("\U0010ffff\ue000", [189, 233, 140, 140, 185, 218, 218]),
    ("<|im_end", [44, 108, 306, 79, 486]),
    ("    x", [333, 1792]),
    ("\n\n\n  y", [1116, 3805, 329]),
]


@pytest.mark.slow
def test_smollm2_equals_llama_cpp(smollm2: LoadedModel) -> None:
    for text, ids in GOLDEN:
        assert smollm2.tokenizer.encode(text) == ids
        assert smollm2.tokenizer.decode(ids, skip_special=False) == text


@pytest.mark.slow
@settings(deadline=None, max_examples=300)
@given(text=ANY_TEXT)
def test_smollm2_gives_any_text_back(smollm2: LoadedModel, text: str) -> None:
    tokenizer = smollm2.tokenizer
    text = "".join(character for character in text if not set(character.encode()) & set(tokenizer.missing_bytes))
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.slow
def test_smollm2_says_what_its_vocabulary_lacks(smollm2: LoadedModel) -> None:
    assert [byte for byte in smollm2.tokenizer.missing_bytes if byte < 0x80] == [0x04, 0x06, 0x13, 0x14, 0x16, 0x1D]
    with pytest.warns(UserWarning, match="no token for 2 bytes"):
        ids = smollm2.tokenizer.encode("ab")
    assert smollm2.tokenizer.decode(ids) == "ab"


@pytest.mark.slow
def test_smollm2_vocabulary(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    assert (tokenizer.vocab_size, tokenizer.token_text(tokenizer.eos)) == (49_152, "<|im_end|>")
    assert {tokenizer.token_text(i) for i in tokenizer.stop_ids} == {"<|im_end|>", "<|endoftext|>"}
    for token in tokenizer.special_ids:
        assert tokenizer.encode(tokenizer.token_text(token)) == [token]
    for token in range(0, tokenizer.vocab_size, 7):
        assert tokenizer.token_bytes(token).decode("utf-8", "replace") == tokenizer.backend.decode([token], skip_special_tokens=False)
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("90210")] == [b"9", b"0", b"2", b"1", b"0"]
