"""peft folders: read as peft means them, and everything that is not carried out, damaged or hostile refused by name."""

import json
import re

import pytest
import torch
from adapters import adapter, write
from safetensors.torch import load_file, save_file

from armillary.core.errors import ArmillaryError, CapacityError, FormatError, InputError, NotFoundError
from armillary.kernels.cpu_library import PARTS
from armillary.models.config import ModelConfig
from armillary.models.lora import read_lora
from armillary.models.lora_config import projections

CONFIG = ModelConfig("llama", 97, 32, 48, 3, 4, 2, 16, 256)


def folder_of(tmp_path, low=None, **changes):
    return write(tmp_path / "adapter", CONFIG, low or adapter(CONFIG, 0), **changes)


def reconfigured(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def retensored(folder, change):
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_was_written_is_read(tmp_path, dtype):
    wanted = adapter(CONFIG, 0, rank=5, scale=3.0)
    found = read_lora(folder_of(tmp_path, wanted, dtype=dtype), CONFIG)
    assert found.rank == 5
    assert found.nbytes == wanted.nbytes == 4 * 5 * sum(n + k for _, (n, k) in projections(CONFIG))
    assert [file.path.name for file in found.files] == ["adapter_config.json", "adapter_model.safetensors"]
    for layer, other in zip(found.layers, wanted.layers, strict=True):
        for low, expected in zip(layer, other, strict=True):
            assert low.scale == 3.0
            assert torch.equal(low.a, expected.a.to(dtype).float())
            assert torch.equal(low.b, expected.b.to(dtype).float())


def test_ranks_and_alphas_by_pattern_and_rslora(tmp_path):
    """As peft: the first pattern that matches the end of the module's name, from its beginning or from a dot on."""
    folder = folder_of(tmp_path, adapter(CONFIG, 0, rank=4))
    patterns = {"rank_pattern": {r"layers\.[12]\.self_attn\.q_proj": 2, "q_proj": 3}, "alpha_pattern": {"mlp.up_proj": 24, "^v_proj": 5}}
    reconfigured(folder, use_rslora=True, lora_alpha=8, **patterns)

    def cut(tensors):
        for name in list(tensors):
            if "q_proj" in name:
                rank = 3 if ".0." in name else 2
                tensors[name] = (tensors[name][:rank] if "lora_A" in name else tensors[name][:, :rank]).contiguous()

    found = read_lora(retensored(folder, cut), CONFIG)
    q = [layer[0] for layer in found.layers]
    assert [low.rank for low in q] == [3, 2, 2]
    assert [low.scale for low in q] == pytest.approx([8 / 3**0.5, 8 / 2**0.5, 8 / 2**0.5])
    assert {low.scale for layer in found.layers for low in layer[2:3]} == {4.0}  # "^v_proj" is no module's whole name
    assert {layer[PARTS.index("up_proj")].scale for layer in found.layers} == {12.0}


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"target_modules": ["q_proj", "mlp.down_proj"]}, lambda layer, part: part in ("q_proj", "down_proj")),
        ({"target_modules": r".*\.layers\.\d\.self_attn\.[qv]_proj"}, lambda layer, part: part in ("q_proj", "v_proj")),
        ({"target_modules": "all-linear", "exclude_modules": ["o_proj"]}, lambda layer, part: part != "o_proj"),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers"}, lambda layer, part: layer != 1),
        ({"layers_to_transform": 1}, lambda layer, part: layer == 1),
        ({"target_modules": ["model.layers.1.mlp.up_proj"]}, lambda layer, part: (layer, part) == (1, "up_proj")),
    ],
)
def test_which_projections_have_one(tmp_path, changes, kept):
    wanted = {name for name, _ in projections(CONFIG) if kept(int(name.split(".")[2]), name.rpartition(".")[2])}

    def cut(tensors):
        for name in list(tensors):
            if name.removeprefix("base_model.model.").rpartition(".lora_")[0] not in wanted:
                del tensors[name]

    found = read_lora(retensored(reconfigured(folder_of(tmp_path), **changes), cut), CONFIG)
    names = [name for name, _ in projections(CONFIG)]
    have = [low is not None for layer in found.layers for low in layer]
    assert {name for name, has in zip(names, have, strict=True) if has} == wanted


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"something_of_next_year": {"a": 1}}, "something_of_next_year"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["c_attn"]}, "c_attn"),
        ({"target_modules": ".*"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
        ({"target_modules": 3}, "target_modules"),
        ({"layers_to_transform": [3]}, "layers_to_transform"),
        ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern"),
        ({"r": 513}, "r is 513"),
        ({"r": 0}, "r is 0"),
        ({"r": "8"}, "r is '8'"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"rank_pattern": {"q_proj": 100000}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 2.5}}, "rank_pattern"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": -1}}, "alpha_pattern"),
        ({"alpha_pattern": {"(?=q)q_proj": 1}}, "look-around"),
        ({"alpha_pattern": {"q" * 3000: 1}}, "characters"),
    ],
)
def test_what_is_not_carried_out_is_refused_by_name(tmp_path, changes, word):
    with pytest.raises(InputError, match=re.escape(word)):
        read_lora(reconfigured(folder_of(tmp_path), **changes), CONFIG)


def test_a_pattern_made_to_run_for_ever_does_not(tmp_path):
    """Python's own engine would take 2^30 steps for this one."""
    folder = reconfigured(folder_of(tmp_path), alpha_pattern={"(([a-z_.0-9])*)*!": 1})
    assert read_lora(folder, CONFIG).rank == 4


NAME = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda t: t.pop(NAME), "is missing"),
        (lambda t: t.update({NAME: torch.zeros(4, 33)}), r"\[4, 33\]"),
        (lambda t: t.update({NAME: torch.zeros(3, 32)}), r"\[3, 32\]"),
        (lambda t: t.update({NAME: torch.zeros(4, 32, dtype=torch.int64)}), "I64"),
        (lambda t: t.update({NAME: torch.full((4, 32), torch.nan)}), "NaN"),
        (lambda t: t.update({"base_model.model.lm_head.weight": torch.zeros(97, 32)}), "lm_head.weight"),
        (lambda t: t.update({NAME.replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(64)}), "lora_magnitude_vector"),
        (lambda t: t.update({"huge": torch.zeros(1_000_000)}), "bytes"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, word):
    with pytest.raises(InputError, match=word):
        read_lora(retensored(folder_of(tmp_path), change), CONFIG)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    folder = folder_of(tmp_path)
    for other in (
        ModelConfig("llama", 97, 32, 64, 3, 4, 2, 16, 256),
        ModelConfig("llama", 97, 32, 48, 2, 4, 2, 16, 256),
        ModelConfig("llama", 97, 32, 48, 4, 4, 2, 16, 256),
    ):
        with pytest.raises(InputError):
            read_lora(folder, other)


def test_files_that_are_not_there_pickled_or_damaged(tmp_path):
    with pytest.raises(NotFoundError, match=r"adapter_config\.json"):
        read_lora(tmp_path, CONFIG)
    folder = folder_of(tmp_path)
    weights = folder / "adapter_model.safetensors"
    content = weights.read_bytes()
    for damaged in (b"", content[:7], content[:-100], b"\xff" * 8 + content[8:], (1 << 40).to_bytes(8, "little") + content[8:]):
        weights.write_bytes(damaged)
        with pytest.raises(FormatError, match="safetensors"):
            read_lora(folder, CONFIG)
    weights.unlink()
    with pytest.raises(NotFoundError, match=r"adapter_model\.safetensors"):
        read_lora(folder, CONFIG)
    (folder / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="pickle"):
        read_lora(folder, CONFIG)
    (folder / "adapter_config.json").write_text("[" * 100_000)
    weights.write_bytes(content)
    with pytest.raises(ArmillaryError, match="not JSON"):
        read_lora(folder, CONFIG)


def test_what_is_too_large_is_refused_before_it_is_read(tmp_path):
    folder = folder_of(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(b"never opened")
    with pytest.raises(CapacityError, match="bound is 1,000"):
        read_lora(folder, CONFIG, max_bytes=1_000)
