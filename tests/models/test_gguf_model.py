"""Models to GGUF and back: names, layouts and metadata, checked against the peer's reader and against the decoder's own logits."""

import dataclasses
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.core.errors import ArmillaryError, FormatError, InputError
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.models.gguf.load import load_gguf
from armillary.models.gguf.mapping import deinterleave, interleave, tensor_names
from armillary.models.gguf.metadata import config_metadata, gguf_config
from armillary.models.gguf.quant import dequantise
from armillary.models.gguf.reader import GGUFFile
from armillary.models.gguf.rope_factors import fit_llama3, llama3_factors
from armillary.models.gguf.writer import write_gguf
from armillary.models.hf import load_hf
from armillary.models.weights import hf_parameters

LLAMA = ModelConfig(
    architecture="llama", vocab_size=96, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
    max_context=256,
)  # fmt: skip
LLAMA3_ROPE = RopeConfig(theta=500_000.0, kind="llama3", factor=8.0, original_context=8192, low_freq_factor=1.0, high_freq_factor=4.0)
GEMMA = dataclasses.replace(
    LLAMA, architecture="gemma2", activation="gelu_tanh", embedding_scale=8.0, norm_offset=1.0, tie_embeddings=True, norm_eps=1e-6
)
CONFIGS = {
    "llama": LLAMA,
    "tied": dataclasses.replace(LLAMA, tie_embeddings=True),
    "biased": dataclasses.replace(LLAMA, qkv_bias=True, o_bias=True, mlp_bias=True),
    "wide heads": dataclasses.replace(LLAMA, head_dim=32),
    "llama 3.1": dataclasses.replace(LLAMA, rope=LLAMA3_ROPE, head_dim=64, num_heads=2, num_kv_heads=1),
    "linear rope": dataclasses.replace(LLAMA, rope=RopeConfig(kind="linear", factor=4.0)),
    "yarn": dataclasses.replace(LLAMA, rope=RopeConfig(theta=1e6, kind="yarn", factor=4.0, original_context=64)),
    "yarn, own temperature": dataclasses.replace(
        LLAMA, rope=RopeConfig(kind="yarn", factor=4.0, original_context=64, attention_factor=1.25, beta_fast=16.0)
    ),
    "mistral": dataclasses.replace(LLAMA, architecture="mistral", windows=(8, 8)),
    "qwen2": dataclasses.replace(LLAMA, architecture="qwen2", qkv_bias=True, rope=RopeConfig(theta=1e6), windows=(None, 8)),
    "qwen3": dataclasses.replace(LLAMA, architecture="qwen3", qk_norm=True, head_dim=32),
    "gemma": dataclasses.replace(GEMMA, architecture="gemma"),
    "gemma2": dataclasses.replace(
        GEMMA, sandwich_norms=True, windows=(8, None), attention_softcap=50.0, logit_softcap=30.0, attention_scale=24**-0.5
    ),
    "gemma3": dataclasses.replace(
        GEMMA, architecture="gemma3", sandwich_norms=True, qk_norm=True, num_layers=7, windows=(8, 8, 8, 8, 8, None, 8),
        rope=RopeConfig(theta=1e6, kind="linear", factor=8.0), local_rope=RopeConfig(),
    ),
}  # fmt: skip


def model(config: ModelConfig, seed: int = 0) -> Decoder:
    torch.manual_seed(seed)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return decoder


def logits(decoder: Decoder) -> torch.Tensor:
    tokens = torch.arange(24) * 5 % 96
    with torch.inference_mode():
        return decoder(tokens, torch.arange(24), CausalAttend([24]))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_survives_the_file_unchanged(tmp_path: Path, name: str) -> None:
    decoder = model(CONFIGS[name])
    path = write_gguf(decoder, tmp_path / "m.gguf", "F32")
    back = load_gguf(path)
    torch.testing.assert_close(logits(back), logits(decoder), rtol=1e-4, atol=1e-5)
    for key, parameter in hf_parameters(back).items():
        if decoder.config.norm_offset:
            torch.testing.assert_close(parameter, hf_parameters(decoder)[key], rtol=0, atol=1e-7)
        else:
            assert torch.equal(parameter, hf_parameters(decoder)[key]), key
    config = dataclasses.replace(back.config, rope=decoder.config.rope, attention_scale=decoder.config.attention_scale)
    assert config == decoder.config


def test_every_family_of_transformers_survives_gguf(peer: Any, tmp_path: Path) -> None:
    peer.save_pretrained(tmp_path / "hf")
    decoder = load_hf(tmp_path / "hf")
    back = load_gguf(write_gguf(decoder, tmp_path / "m.gguf", "F32"))
    tokens = torch.arange(24) * 5 % 131
    with torch.inference_mode():
        theirs = peer(tokens[None]).logits[0]
        ours = back(tokens, torch.arange(24), CausalAttend([24]))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_the_peer_reads_the_same_values(tmp_path: Path, kind: str) -> None:
    path = write_gguf(model(LLAMA), tmp_path / "m.gguf", kind, metadata={"general.name": "tiny", "test.list": [1, -2]})
    peer, ours = gguf.GGUFReader(path), GGUFFile.open(path)
    assert peer.fields["general.name"].contents() == "tiny"
    assert peer.fields["test.list"].contents() == [1, -2]
    assert {t.name for t in peer.tensors} == set(tensor_names(LLAMA))
    for tensor in peer.tensors:
        assert tensor.tensor_type.name == (kind if len(tensor.shape) > 1 else "F32")
        theirs = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(dequantise(ours.tensors[tensor.name]), theirs.reshape(ours.tensors[tensor.name].shape))
    step = {"F32": 0.0, "F16": 0.0, "Q8_0": 1 / 127, "Q4_0": 1 / 8}[kind]  # of a block's largest magnitude; +8 is cut to +7
    rounding = 0.0 if kind == "F32" else 2**-11
    for stored, exact in zip(load_gguf(path).parameters(), model(LLAMA).parameters(), strict=True):
        if exact.ndim > 1:
            blocks = exact.reshape(-1, 32)
            largest = blocks.abs().amax(1, keepdim=True)
            bound = largest * (step * (0.5 if kind == "Q8_0" else 1.0) + rounding) * 1.001
            assert ((stored.reshape(-1, 32) - blocks).abs() <= bound).all()


def test_rows_are_interleaved_as_the_converter_of_llama_cpp_does() -> None:
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    # convert_hf_to_gguf: weights.reshape(heads, 2, head_dim // 2, columns).swapaxes(1, 2)
    stored = interleave(rows, 2)
    assert stored[:, 0].tolist() == [rows[i, 0] for head in (0, 8) for pair in range(4) for i in (head + pair, head + pair + 4)]
    np.testing.assert_array_equal(deinterleave(stored, 2), rows)


def test_gemma_norms_are_stored_with_their_offset(tmp_path: Path) -> None:
    decoder = model(CONFIGS["gemma2"])
    file = GGUFFile.open(write_gguf(decoder, tmp_path / "m.gguf", "F32"))
    np.testing.assert_array_equal(dequantise(file.tensors["output_norm.weight"]), decoder.norm.weight.detach().numpy() + np.float32(1))


@given(
    factor=st.sampled_from([2.0, 8.0, 32.0]), original=st.sampled_from([2048, 8192, 10_000]), low=st.sampled_from([1.0, 2.0]),
    ratio=st.sampled_from([2.0, 4.0, 16.0]),
)  # fmt: skip
def test_llama3_factors_give_their_parameters_back(factor: float, original: int, low: float, ratio: float) -> None:
    rope = RopeConfig(500_000.0, "llama3", factor, original, low, low * ratio)
    fitted = fit_llama3(llama3_factors(rope, 128), 500_000.0, 128, "test")
    np.testing.assert_allclose(llama3_factors(fitted, 128), llama3_factors(rope, 128), rtol=1e-4)
    assert fitted.factor == factor


@given(theta=st.sampled_from([5000.0, 500_000.0]), original=st.integers(16, 4096), head_dim=st.sampled_from([8, 12, 64]))
def test_few_pairs_are_enough(theta: float, original: int, head_dim: int) -> None:
    # One pair or none between the two regimes leaves a choice of parameters; any that gives the same factors is right.
    rope = RopeConfig(theta, "llama3", 4.0, original, 1.0, 4.0)
    factors = llama3_factors(rope, head_dim)
    fitted = fit_llama3(factors, theta, head_dim, "test")
    again = np.ones_like(factors) if fitted.kind == "default" else llama3_factors(fitted, head_dim)
    np.testing.assert_allclose(again, factors, rtol=1e-3)


def test_factors_of_another_form_are_refused() -> None:
    with pytest.raises(InputError, match="does not follow Llama 3"):
        fit_llama3(np.linspace(1, 3, 32), 10_000.0, 64, "test")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gpt_neox"}, "cannot be written as GGUF"),
        ({"activation": "gelu_tanh"}, "cannot express activation"),
        ({"embedding_scale": 8.0}, "cannot express embedding_scale"),
        ({"windows": (8, 16)}, "one window size"),
        ({"rope": RopeConfig(kind="yarn", factor=4.0, original_context=64, truncate=False)}, "cannot express rope"),
    ],
)
def test_what_gguf_cannot_hold_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        write_gguf(model(dataclasses.replace(LLAMA, **changes)), tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(model(dataclasses.replace(LLAMA, num_layers=1)), tmp_path_factory.mktemp("tiny") / "m.gguf", "Q8_0")


def rewritten(tiny: Path, tmp_path: Path, keys: dict[str, Any], drop: tuple[str, ...] = (), rename: dict[str, str] | None = None) -> Path:
    """The tiny file with some keys and tensors changed, written by the peer."""
    file = GGUFFile.open(tiny)
    path = tmp_path / "changed.gguf"
    writer = gguf.GGUFWriter(path, keys.pop("general.architecture", "llama"))
    for key, value in (dict(file.metadata) | keys).items():
        if key == "general.architecture" or value is None:
            continue
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        else:
            writer.add_array(key, list(value))
    for name, tensor in file.tensors.items():
        if name not in drop:
            kind = gguf.GGMLQuantizationType(tensor.type.id)
            data = np.array(tensor.data).reshape(*tensor.shape[:-1], -1)
            writer.add_tensor((rename or {}).get(name, name), data.view(np.float32) if kind == 0 else data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not supported"),
        ({"llama.block_count": None}, "'llama.block_count' is missing"),
        ({"llama.block_count": 2}, r"9 tensors are missing, first 'blk.1.attn_norm.weight'"),
        ({"llama.block_count": 4000}, "4000 layers cannot lie in 12 tensors"),
        ({"llama.embedding_length": 2**31}, "2,147,483,648; 1 to 16,777,216"),
        ({"llama.embedding_length": 128}, r"shape \(96, 64\); its metadata says \(96, 128\)"),
        ({"llama.feed_forward_length": [96, 32]}, "differs from layer to layer"),
        ({"llama.attention.head_count": 0}, "is 0; 1 to"),
        ({"llama.attention.head_count_kv": 3}, "4 query heads cannot share 3"),
        ({"llama.attention.head_count": "four"}, "not an integer"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "is nan"),
        ({"llama.attention.layer_norm_rms_epsilon": None}, "is missing"),
        ({"llama.rope.dimension_count": 8}, "only equal ones"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "'longrope' is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "is missing for yarn"),
        ({"llama.expert_count": 8}, "mixture of 8 experts"),
    ],
)
def test_metadata_out_of_bounds_is_named(tiny: Path, tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_gguf(rewritten(tiny, tmp_path, dict(keys)))


def test_missing_and_foreign_tensors_are_named(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"1 tensors are missing, first 'blk.0.ffn_up.weight'"):
        load_gguf(rewritten(tiny, tmp_path, {}, drop=("blk.0.ffn_up.weight",)))
    with pytest.raises(FormatError, match=r"token_embd.weight is missing"):
        load_gguf(rewritten(tiny, tmp_path, {}, drop=("token_embd.weight",)))
    with pytest.raises(FormatError, match=r"missing, first 'blk.0.ffn_up.weight'"):
        load_gguf(rewritten(tiny, tmp_path, {}, rename={"blk.0.ffn_up.weight": "blk.0.ffn_upp.weight"}))


def test_gemma_27b_scales_queries_by_its_width() -> None:
    # llama.cpp decides this by the number of layers; the file does not say it.
    config = dataclasses.replace(CONFIGS["gemma2"], num_layers=46, windows=(8, None) * 23, num_heads=2, attention_scale=None)
    metadata = config_metadata(config)
    shapes = dict.fromkeys(tensor_names(config), (1,)) | {"token_embd.weight": (96, 64)}
    from armillary.models.gguf.metadata import config_from

    assert config_from(metadata, shapes, None).scale == 32**-0.5


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutated_models_load_or_are_refused(tiny: Path, tmp_path: Path, data: st.DataObject) -> None:
    raw = bytearray(tiny.read_bytes())
    header = max(2048, len(raw) - 40_000)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, header))
        change = data.draw(st.binary(min_size=1, max_size=9))
        raw[at : at + len(change)] = change
    path = tmp_path / "mutated.gguf"
    path.write_bytes(raw[: data.draw(st.sampled_from([len(raw), len(raw), len(raw) // 2]))])
    try:
        decoder = load_gguf(path)
    except ArmillaryError:
        return
    assert sum(parameter.numel() for parameter in decoder.parameters()) == decoder.config.parameters()
    assert gguf_config(GGUFFile.open(path)) == decoder.config
