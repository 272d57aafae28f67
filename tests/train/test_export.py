"""What is exported is read back: exactly where the format is exact, within its rounding elsewhere, and never left behind when it is wrong."""

import pytest
import torch
from tiny import decoder

from armillary.core.errors import FormatError, InputError
from armillary.data.prepare import prepare_text
from armillary.models.config import ModelConfig
from armillary.models.load import load
from armillary.models.tokenizer import Tokenizer
from armillary.train import export as exporting
from armillary.train.export import TOLERANCE, export


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    (folder / "a.txt").write_text("what runs where and when is data " * 40)
    prepare_text([folder / "a.txt"], folder / "corpus", vocabulary=280, validation=0.0)
    return Tokenizer.from_json(folder / "corpus" / "tokenizer")


@pytest.fixture(scope="module")
def model(tokenizer):
    made = decoder(config=ModelConfig("llama", tokenizer.vocab_size, 32, 64, 2, 4, 2, 8, 128, tie_embeddings=True))
    for parameter in made.parameters():  # logits with a spread
        torch.nn.init.normal_(parameter, std=0.3)
    return made


@pytest.mark.parametrize(
    ("to", "stored"), [("hf", "F32"), ("hf", "F16"), ("hf", "BF16"), ("gguf", "F32"), ("gguf", "F16"), ("gguf", "Q8_0")]
)
def test_logits_survive(tmp_path, model, tokenizer, to, stored):
    path = tmp_path / ("out" if to == "hf" else "out.gguf")
    done = export(model, tokenizer, path, to, stored)
    if stored == "F32":
        assert done.difference == 0
    assert 0 <= done.relative <= TOLERANCE[stored]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    assert load(path).tokenizer.encode("what runs") == tokenizer.encode("what runs")


def test_what_reads_back_wrong_is_not_left_behind(tmp_path, model, tokenizer, monkeypatch):
    real = exporting.save_hf

    def save(decoder, *arguments, **options):
        damaged = type(decoder)(decoder.config)
        damaged.load_state_dict(decoder.state_dict())
        weight = damaged.layers[1].self_attn.qkv.q_proj.weight
        weight.data = weight.data.flip(0)  # heads out of order
        real(damaged, *arguments, **options)

    monkeypatch.setattr(exporting, "save_hf", save)
    with pytest.raises(FormatError, match="reads back as another model"):
        export(model, tokenizer, tmp_path / "out", "hf")
    assert not list(tmp_path.iterdir())


def test_bounds(tmp_path, model, tokenizer):
    with pytest.raises(InputError, match="hf cannot store Q8_0 here: choose one of F32, F16, BF16"):
        export(model, tokenizer, tmp_path / "out", "hf", "Q8_0")
    with pytest.raises(InputError, match="exists"):
        export(model, tokenizer, tmp_path, "hf")
