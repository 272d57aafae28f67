"""`load` gives the same model whichever form it is stored in, and says what it is."""

import dataclasses
import warnings
from pathlib import Path

import pytest
import torch

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.writer import write_file, write_gguf
from armillary.models.hf import save_hf
from armillary.models.load import LoadedModel, load
from armillary.models.tokenizer import Tokenizer

CHATML = (
    "{% for m in messages %}<turn>{{ m.role }} {{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}<turn>assistant {% endif %}"
)
BYTES = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]  # GPT-2's stand-ins, in no special order
TOKENS = [*BYTES, "th", "the", "<turn>", "<end>", "<eos>"]
KEYS = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": TOKENS,
    "tokenizer.ggml.token_type": [1] * 258 + [3] * 3,
    "tokenizer.ggml.merges": ["t h", "th e"],
    "tokenizer.ggml.eos_token_id": 260,
    "tokenizer.chat_template": CHATML,
}
CONFIG = ModelConfig(
    architecture="llama", vocab_size=len(TOKENS), hidden_size=64, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2,
    head_dim=16, max_context=512, tie_embeddings=True,
)  # fmt: skip


def model(config: ModelConfig = CONFIG) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config)


def logits(decoder: Decoder) -> torch.Tensor:
    with torch.inference_mode():
        return decoder(torch.arange(20), torch.arange(20), CausalAttend([20])).float()


@pytest.fixture
def gguf_path(tmp_path: Path) -> Path:
    return write_gguf(model(), tmp_path / "tiny.gguf", "F32", metadata={**KEYS, "general.name": "Tiny  Model", "general.license": "mit"})


@pytest.mark.filterwarnings("ignore:.*ends a turn")
def test_a_file_and_a_folder_are_the_same_model(gguf_path: Path, tmp_path: Path) -> None:
    file = load(gguf_path)
    save_hf(file.decoder, tmp_path / "folder", file.tokenizer)
    folder = load(tmp_path / "folder")
    again = load(write_gguf(folder.decoder, tmp_path / "again.gguf", "F32", tokenizer=folder.tokenizer))
    for other in (folder, again):
        assert torch.equal(logits(other.decoder), logits(file.decoder))
        assert other.tokenizer.encode("the <turn> é") == file.tokenizer.encode("the <turn> é")
        assert other.tokenizer.stop_ids == file.tokenizer.stop_ids
        messages = [{"role": "user", "content": "the"}]
        assert other.chat_template is not None
        assert file.chat_template is not None
        assert other.chat_template.render(messages) == file.chat_template.render(messages)


@pytest.mark.filterwarnings("ignore:.*ends a turn")
def test_the_description_says_what_it_is(gguf_path: Path) -> None:
    loaded = load(str(gguf_path))
    for fact in (
        "Tiny Model: llama",
        f"{CONFIG.parameters() / 1e6:,.1f} M parameters",
        "2 layers",
        "stored as F32",
        "context 512",
        "licence mit",
    ):
        assert fact in loaded.description
    assert "\n" not in loaded.description
    assert (loaded.name, loaded.source_path) == (str(gguf_path), gguf_path)


def test_a_turns_end_that_is_not_listed_stops_too_and_says_so(gguf_path: Path) -> None:
    with pytest.warns(UserWarning, match="ends a turn with <end>"):
        loaded = load(gguf_path)
    assert loaded.tokenizer.stop_ids == {259, 260}


def test_a_listed_end_of_turn_warns_of_nothing(tmp_path: Path) -> None:
    path = write_gguf(model(), tmp_path / "m.gguf", metadata={**KEYS, "tokenizer.ggml.eot_token_id": 259})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load(path).tokenizer.stop_ids == {259, 260}


@pytest.mark.filterwarnings("ignore:.*ends a turn")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_take_the_dtype_that_is_asked_for(gguf_path: Path, dtype: torch.dtype) -> None:
    loaded = load(gguf_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.decoder.parameters()} == {dtype}
    for ours, exact in zip(loaded.decoder.parameters(), model().parameters(), strict=True):
        assert torch.equal(ours, exact.to(dtype))


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    loaded = load(write_gguf(model(), tmp_path / "m.gguf", metadata={**KEYS, "tokenizer.chat_template": ""}))
    assert loaded.chat_template is None
    assert "no chat template" in loaded.description


def test_a_token_that_the_model_lacks_is_refused_where_it_is_written(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS) - 2)
    path = write_gguf(model(config), tmp_path / "m.gguf", metadata={**KEYS, "tokenizer.chat_template": ""})
    loaded = load(path)
    assert loaded.tokenizer.encode("the <turn>")[-1] == 258
    with pytest.raises(InputError, match=r"'<end>', token 259; the model knows 259 tokens"):
        loaded.tokenizer.encode("the <end>")


def test_a_bos_that_the_model_lacks_never_reaches_it(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS) - 2)
    keys = {**KEYS, "tokenizer.chat_template": "", "tokenizer.ggml.bos_token_id": 260, "tokenizer.ggml.add_bos_token": True}
    loaded = load(write_gguf(model(config), tmp_path / "m.gguf", metadata=keys))
    with pytest.raises(InputError, match=r"token 260; the model knows 259 tokens"):
        loaded.tokenizer.encode("the")


def test_ids_of_padded_embeddings_are_no_text_and_no_error(tmp_path: Path) -> None:
    """Qwen 2.5 has 151,936 rows and 151,665 tokens: a row without a token can be drawn like any other."""
    config = dataclasses.replace(CONFIG, vocab_size=len(TOKENS) + 3)
    tokenizer = load(write_gguf(model(config), tmp_path / "m.gguf", metadata={**KEYS, "tokenizer.chat_template": ""})).tokenizer
    pad, the = len(TOKENS) + 2, tokenizer.encode("the")
    assert (tokenizer.token_bytes(pad), tokenizer.token_text(pad)) == (b"", f"[PAD{pad}]")
    assert tokenizer.decode([pad, *the, pad]) == "the"
    with pytest.raises(InputError, match="outside the vocabulary"):
        tokenizer.token_bytes(pad + 1)


def test_what_cannot_be_loaded_is_named(tmp_path: Path, gguf_path: Path) -> None:
    with pytest.raises(NotFoundError, match="did you mean smollm2"):
        load("smollm")
    save_hf(model(), tmp_path / "folder")
    with pytest.raises(NotFoundError, match=r"has no tokenizer\.json"):
        load(tmp_path / "folder")
    (tmp_path / "short.gguf").write_bytes(gguf_path.read_bytes()[:-1])
    with pytest.raises(FormatError, match="ends at byte"):
        load(tmp_path / "short.gguf")
    only_words = write_file(tmp_path / "words.gguf", {"general.architecture": "llama", **KEYS}, [])
    with pytest.raises(FormatError, match=r"token_embd\.weight is missing"):
        load(only_words)


@pytest.mark.slow
def test_smollm2_survives_being_written(smollm2: LoadedModel, tmp_path: Path) -> None:
    path = write_gguf(smollm2.decoder, tmp_path / "smollm2.gguf", "Q8_0", tokenizer=smollm2.tokenizer)
    again = load(path)
    assert again.tokenizer.encode("Hello 123") == smollm2.tokenizer.encode("Hello 123")
    ids = smollm2.tokenizer.encode(
        "<|im_start|>user\nName the capital of France.<|im_end|>\n<|im_start|>assistant\nThe capital of France is"
    )
    places = torch.arange(len(ids))
    with torch.inference_mode():
        rows = [m.decoder(torch.tensor(ids), places, CausalAttend([len(ids)]), places[-1:])[0] for m in (smollm2, again)]
    assert smollm2.tokenizer.decode([int(rows[0].argmax())]) == smollm2.tokenizer.decode([int(rows[1].argmax())]) == " Paris"
    assert Tokenizer.from_gguf(GGUFFile.open(path)).vocab_size == 49_152
