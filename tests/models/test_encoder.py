"""The encoder is transformers' BertModel on the same weights, whatever shares its batch, and no padding is computed."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

from armillary.core.errors import ArmillaryError, FormatError, InputError
from armillary.kernels.packed_linear import PackedLinear
from armillary.models import hub
from armillary.models.encoder import load_encoder
from armillary.models.encoder_config import is_encoder, read_encoder_config
from armillary.models.load import load

sys.path.insert(0, str(Path(__file__).parent))
from encoders import reference, tiny_bert


def sequences(vocabulary: int, lengths: list[int]) -> list[list[int]]:
    draw = random.Random(7)
    return [[draw.randrange(vocabulary) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("mean", False), ("cls", True)])
def test_a_packed_batch_gives_what_bert_gives_to_each_alone(tmp_path, packed, pooling, normalize):
    folder = tiny_bert(tmp_path / "tiny", pooling=pooling, normalize=normalize)
    loaded = load_encoder(str(folder), packed=packed)
    given = sequences(loaded.config.vocab_size, [5, 1, 40, 5, 17, 2, 40, 5])
    found = loaded.encoder.embed(given)
    assert torch.allclose(found, reference(folder, given, pooling=pooling, normalize=normalize), atol=1e-5)
    assert torch.allclose(found, torch.cat([loaded.encoder.embed([one]) for one in given]), atol=1e-6)


def test_linear_layers_see_the_tokens_and_no_padding(tmp_path):
    encoder = load_encoder(str(tiny_bert(tmp_path / "tiny"))).encoder
    rows: list[int] = []
    for module in encoder.modules():
        if isinstance(module, PackedLinear):
            module.register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    lengths = [3, 30, 8]
    encoder.embed(sequences(50, lengths))
    assert rows == [sum(lengths)] * 4 * 2  # qkv, out, up and down of each layer


def test_texts_are_neither_cut_nor_padded_by_the_tokenizers_own_settings(tmp_path):
    loaded = load_encoder(str(tiny_bert(tmp_path / "tiny")))
    assert loaded.encode("The sun") == (2, 56, 57, 3)
    assert len(loaded.encode("a " * 30)) == 32
    assert (loaded.config.max_tokens, loaded.config.positions) == (24, 40)


def test_a_model_with_a_head_above_it_is_read_too(tmp_path):
    import transformers

    folder = tiny_bert(tmp_path / "tiny")
    given = sequences(50, [4, 9])
    expected = load_encoder(str(folder)).encoder.embed(given)
    body = transformers.BertModel.from_pretrained(folder)
    head = transformers.BertForMaskedLM(body.config)
    head.bert.load_state_dict(body.state_dict(), strict=False)
    head.save_pretrained(folder)
    assert torch.equal(load_encoder(str(folder)).encoder.embed(given), expected)


@pytest.mark.parametrize(
    ("file", "changes", "kind", "named"),
    [
        ("config.json", {"hidden_act": "relu"}, InputError, "hidden_act"),
        ("config.json", {"position_embedding_type": "relative_key"}, InputError, "position_embedding_type"),
        ("config.json", {"num_attention_heads": 5}, FormatError, "num_attention_heads"),
        ("config.json", {"hidden_size": -1}, FormatError, "hidden_size"),
        ("config.json", {"intermediate_size": 64}, FormatError, "intermediate.dense"),
        ("config.json", {"num_hidden_layers": 3}, FormatError, "layer.2"),
        ("config.json", {"num_hidden_layers": 1}, FormatError, "layer.1"),
        ("config.json", {"vocab_size": 20}, FormatError, "tokenizer.json"),
        ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, InputError, "no pooling"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, InputError, "pooling_mode_max_tokens"),
    ],
)
def test_what_it_cannot_carry_out_is_named(tmp_path, file, changes, kind, named):
    folder = tiny_bert(tmp_path / "tiny")
    (folder / file).write_text(json.dumps({**json.loads((folder / file).read_text()), **changes}))
    with pytest.raises(kind, match=named):
        load_encoder(str(folder))


def test_damaged_files_are_named(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    for file, content in (("modules.json", "[1]"), ("modules.json", '[{"type": "a.Dense"}]'), ("tokenizer.json", "{}")):
        kept = (folder / file).read_text()
        (folder / file).write_text(content)
        with pytest.raises(ArmillaryError, match=file):
            load_encoder(str(folder))
        (folder / file).write_text(kept)


def test_a_decoders_loader_says_that_it_is_an_encoder(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    assert is_encoder(folder)
    with pytest.raises(InputError, match="encoder"):
        load(str(folder))


@pytest.mark.slow
def test_minilm_is_bert_on_its_weights_and_knows_what_is_alike():
    loaded = load_encoder("minilm")
    folder = hub.resolve("minilm")
    config = read_encoder_config(folder)
    assert (config.hidden_size, config.max_tokens, config.pooling, config.normalize) == (384, 256, "mean", True)
    texts = ["A man is eating food.", "Someone has a meal.", "The girl carries a baby.", "né 👋 unaffable", "z" * 60, "Rain. " * 80]
    ids = [list(loaded.encode(text)) for text in texts]
    vectors = loaded.encoder.embed(ids)
    assert torch.allclose(vectors, reference(folder, ids), atol=1e-5)
    alike = vectors @ vectors[0]
    assert alike[1] > 0.5 > alike[2]
