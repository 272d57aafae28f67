import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from armillary.core.errors import NotFoundError
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.hf import load_hf, save_hf
from armillary.models.tokenizer import Tokenizer

TEXTS = ["the armillary sphere", " two  spaces\nand a line", "<s>already opened", "naïve 球 🙂", ""]


@pytest.fixture
def tokenizer(tmp_path):
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["the sphere models how the heavens move, the rings nest"] * 9, trainer)
    (tmp_path / "source").mkdir()
    backend.save(str(tmp_path / "source" / "tokenizer.json"))
    (tmp_path / "source" / "tokenizer_config.json").write_text(
        '{"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}'
    )
    return Tokenizer.from_json(tmp_path / "source")


@pytest.mark.parametrize(("add_bos", "add_eos"), [(False, False), (True, False), (True, True), (False, True)])
def test_transformers_and_we_encode_alike_from_the_written_folder(tokenizer, add_bos, add_eos, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer.add_bos, tokenizer.add_eos = add_bos, add_eos  # as one from GGUF, which adds them itself
    config = ModelConfig("llama", tokenizer.vocab_size, 16, 24, 1, 2, 1, 8, 64, bos_token_id=tokenizer.bos, eos_token_ids=(tokenizer.eos,))
    save_hf(Decoder(config), tmp_path / "model", tokenizer)
    theirs, again = transformers.AutoTokenizer.from_pretrained(tmp_path / "model"), Tokenizer.from_json(tmp_path / "model")
    for text in TEXTS:
        expected = tokenizer.encode(text, special=False)
        assert theirs(text, add_special_tokens=False)["input_ids"] == again.encode(text, special=False) == expected
        assert again.encode(text) == tokenizer.encode(text)
        assert theirs.decode(expected) == tokenizer.decode(expected, skip_special=False)
    ends = [tokenizer.bos] * add_bos, [tokenizer.eos] * add_eos
    assert theirs(TEXTS[0])["input_ids"] == [*ends[0], *tokenizer.encode(TEXTS[0], special=False), *ends[1]] == tokenizer.encode(TEXTS[0])
    assert theirs.chat_template == again.chat_template == tokenizer.chat_template
    assert (again.bos, again.eos, again.stop_ids) == (tokenizer.bos, tokenizer.eos, tokenizer.stop_ids)
    assert load_hf(tmp_path / "model").config == config


def test_a_folders_files_are_copied(tokenizer, tmp_path):
    config = ModelConfig("llama", tokenizer.vocab_size, 16, 24, 1, 2, 1, 8, 64)
    save_hf(Decoder(config), tmp_path / "model", tmp_path / "source")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    with pytest.raises(NotFoundError, match=r"tokenizer\.json"):
        save_hf(Decoder(config), tmp_path / "other", tmp_path / "nowhere")
