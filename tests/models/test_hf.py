import json
import os
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from armillary.core.errors import ArmillaryError, FormatError, InputError, NotFoundError
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.models.config_file import read_config
from armillary.models.decoder import Decoder
from armillary.models.hf import INDEX, WEIGHTS, load_hf, save_hf
from armillary.models.weights import hf_parameters

TINY = ModelConfig("llama", 61, 16, 24, 2, 2, 1, 8, 128, tie_embeddings=True, bos_token_id=1, eos_token_ids=(2, 5))


def logits(decoder, tokens):
    with torch.no_grad():
        return decoder(tokens, torch.arange(len(tokens)), CausalAttend([len(tokens)]))


@pytest.fixture
def folder(tmp_path):
    save_hf(Decoder(TINY), tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("sharded", [False, True])
def test_from_transformers_and_back(peer, sharded, tmp_path):
    transformers = pytest.importorskip("transformers")
    peer.save_pretrained(tmp_path / "theirs", max_shard_size="30KB" if sharded else "1GB")
    decoder = load_hf(tmp_path / "theirs")
    save_hf(decoder, tmp_path / "ours", max_shard_bytes=30_000 if sharded else 10**9)
    assert (tmp_path / "theirs" / INDEX).exists() == (tmp_path / "ours" / INDEX).exists() == sharded
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    tokens = torch.randint(1, 131, (100,))
    with torch.no_grad():
        assert torch.equal(back(tokens[None]).logits, peer(tokens[None]).logits)
    again = load_hf(tmp_path / "ours")
    assert again.config == decoder.config
    assert torch.equal(logits(again, tokens), logits(decoder, tokens))
    torch.testing.assert_close(logits(again, tokens), peer(tokens[None]).logits[0].detach(), atol=1e-5, rtol=0)


def test_whoever_may_read_the_config_may_read_the_weights(folder):
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_or_casts_the_dtype(dtype, tmp_path):
    decoder = Decoder(TINY)
    save_hf(decoder, tmp_path, dtype=dtype)
    kept, cast = load_hf(tmp_path), load_hf(tmp_path, torch.float32)
    for name, parameter in hf_parameters(decoder).items():
        assert torch.equal(hf_parameters(kept)[name], parameter.to(dtype)), name
        assert torch.equal(hf_parameters(cast)[name], parameter.to(dtype).float()), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_loaded_weights_train_and_leave_the_file_alone(folder):
    before = (folder / WEIGHTS).read_bytes()
    decoder = load_hf(folder)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=1.0)
    decoder(torch.arange(9), torch.arange(9), CausalAttend([9])).pow(2).sum().backward()
    optimizer.step()
    assert decoder.lm_head.weight is decoder.embed_tokens.weight
    assert not torch.equal(decoder.embed_tokens.weight, load_hf(folder).embed_tokens.weight)
    assert (folder / WEIGHTS).read_bytes() == before


def test_ends_of_text_come_from_both_files(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [5, 9]}')
    assert read_config(folder).eos_token_ids == (2, 5, 9)


def test_weights_are_not_overwritten_unasked(folder):
    with pytest.raises(InputError, match="already"):
        save_hf(Decoder(TINY), folder)
    decoder = Decoder(TINY)
    save_hf(decoder, folder, max_shard_bytes=2000, overwrite=True)
    assert not (folder / WEIGHTS).exists()  # a reader would prefer it to the shards
    assert torch.equal(load_hf(folder).embed_tokens.weight, decoder.embed_tokens.weight)
    save_hf(load_hf(folder), folder, overwrite=True)  # memory-mapped from the files that it replaces
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "generation_config.json", WEIGHTS]
    assert torch.equal(load_hf(folder).embed_tokens.weight, decoder.embed_tokens.weight)


def change(folder, edit):
    tensors = load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}), "model.layers.2.mlp.up_proj.weight has no place"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(16)}), "q_proj.bias has no place"),
        (lambda t: t.update({"model.norm.weight": torch.ones(17)}), r"model.norm.weight has shape \[17\], the config says \[16\]"),
        (lambda t: t.update({"model.norm.weight": torch.ones(16, dtype=torch.int8)}), "model.norm.weight is torch.int8"),
        (lambda t: t.update({"lm_head.weight": torch.ones(61, 16)}), "lm_head.weight differs"),
    ],
)
def test_tensors_that_do_not_fit_are_named(folder, edit, message):
    change(folder, edit)
    with pytest.raises(FormatError, match=message):
        load_hf(folder)


def test_what_other_writers_add_is_accepted(folder):
    change(
        folder,
        lambda t: t.update(
            {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4), "lm_head.weight": t["model.embed_tokens.weight"].clone()}
        ),
    )
    load_hf(folder)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"model.norm.weight": "../model.safetensors"}, "same folder"),
        ({"model.norm.weight": "/etc/model.safetensors"}, "same folder"),
        ({"model.norm.weight": "sub/model.safetensors"}, "same folder"),
        ({"model.norm.weight": "..\\model.safetensors"}, "same folder"),
        ({"model.norm.weight": "\0.safetensors"}, "same folder"),
        ({"model.norm.weight": "model.bin"}, "same folder"),
        ({"model.norm.weight": "absent.safetensors"}, "not in the folder"),
        ({"model.norm.weight": 3}, "no weight_map"),
        ({}, "no weight_map"),
        ([], "no weight_map"),
        (None, "no weight_map"),
    ],
)
def test_an_index_that_leaves_the_folder_or_makes_no_sense_is_refused(folder, weight_map, message):
    os.rename(folder / WEIGHTS, folder / "a.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FormatError, match=message):
        load_hf(folder)


def test_an_index_must_say_what_the_shards_say(tmp_path):
    save_hf(Decoder(TINY), tmp_path, max_shard_bytes=4000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    moved = {**index["weight_map"], "model.norm.weight": files[0]}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(FormatError, match=r"model.norm.weight in .* does not hold it"):
        load_hf(tmp_path)
    less = {name: file for name, file in index["weight_map"].items() if "0.mlp.up" not in name}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": less}))
    with pytest.raises(FormatError, match=r"layers.0.mlp.up_proj.weight .* is not in"):
        load_hf(tmp_path)
    (tmp_path / INDEX).write_text(json.dumps(index))
    for name, tensor in load_file(tmp_path / files[0]).items():
        save_file({**load_file(tmp_path / files[1]), name: tensor}, tmp_path / files[1])
        break
    with pytest.raises(FormatError, match="belongs in one shard"):
        load_hf(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{", "nul", '{"weight_map": ' + "[" * 100_000])
@pytest.mark.parametrize("name", ["config.json", INDEX, "generation_config.json"])
def test_json_that_is_none_is_a_format_error(folder, name, text):
    if name == INDEX:
        os.rename(folder / WEIGHTS, folder / "a.safetensors")
    (folder / name).write_text(text)
    with pytest.raises(FormatError, match=name):
        load_hf(folder)


def test_what_is_not_there_is_named(folder):
    with pytest.raises(NotFoundError, match=r"config\.json"):
        load_hf(folder / "nowhere")
    (folder / WEIGHTS).unlink()
    with pytest.raises(NotFoundError, match=WEIGHTS):
        load_hf(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        load_hf(folder)


def test_a_header_that_claims_more_than_the_file_is_refused_before_it_is_read(folder):
    data = (folder / WEIGHTS).read_bytes()
    for size in (2**63, 2**64 - 1, 10**9, len(data), 0):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", size) + data[8:])
        with pytest.raises(FormatError, match=WEIGHTS):
            load_hf(folder)


def test_every_truncation_is_a_format_error(folder):
    data = (folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for length in [*range(0, header, 37), header, header + 1, len(data) - 1]:
        (folder / WEIGHTS).write_bytes(data[:length])
        with pytest.raises(FormatError, match=WEIGHTS):
            load_hf(folder)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=4)), min_size=1, max_size=4))
def test_a_damaged_header_loads_or_is_refused_with_an_error_of_ours(folder, edits):
    original = folder / "original"
    if not original.exists():
        original.write_bytes((folder / WEIGHTS).read_bytes())
    data = bytearray(original.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    for place, value in edits:
        start = int(place * header)
        data[start : start + len(value)] = value
    Path(folder / WEIGHTS).write_bytes(data)
    try:
        decoder = load_hf(folder)
    except ArmillaryError:
        return
    assert all(p.shape == q.shape for p, q in zip(decoder.parameters(), Decoder(TINY).parameters(), strict=True))
