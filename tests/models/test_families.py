import dataclasses

import pytest

from armillary.core.errors import FormatError, InputError
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.families import FAMILIES, from_hf, known, to_hf

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def of(model_type, **options):
    family = next(f for f in FAMILIES if f.model_type == model_type)
    return from_hf({**LLAMA, "model_type": model_type, "architectures": [family.hf_class], **options})


def test_written_and_read_back(peer):
    config = from_hf(peer.config.to_dict())
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_absent_keys_mean_what_they_mean_to_transformers(family):
    transformers = pytest.importorskip("transformers")
    sparse = {**LLAMA, "model_type": family.model_type, "architectures": [family.hf_class]}
    full = transformers.AutoConfig.for_model(**sparse).to_dict()
    assert from_hf(sparse) == from_hf({**full, "architectures": [family.hf_class]})


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)
def test_a_family_is_found_by_its_class_alone(family):
    assert of(family.model_type) == from_hf({**{k: v for k, v in LLAMA.items() if k != "model_type"}, "architectures": [family.hf_class]})


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        ({"model_type": "mixtral", "architectures": ["MixtralForCausalLM"]}, "mixtral"),
        ({"model_type": "gpt2"}, "gpt2"),
        ({}, "None"),
        ({"model_type": 7}, "7"),
        ({**LLAMA, "architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
    ],
)
def test_unknown_families_are_named_and_the_known_ones_listed(raw, named):
    with pytest.raises(InputError, match=named) as error:
        from_hf(raw)
    assert known() in str(error.value)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"num_local_experts": 8}, "mixture of experts"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised"),
        ({"hidden_act": "relu6"}, "relu6"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "strange": 1}}, "strange"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "layer type"),
        ({"num_key_value_heads": 3}, "cannot share 3"),
        ({"head_dim": 15}, "head_dim is 15"),
    ],
)
def test_options_that_we_do_not_run_are_refused_not_ignored(options, named):
    with pytest.raises(InputError, match=named):
        from_hf({**LLAMA, **options})


def test_layer_types_of_another_kind_are_refused():
    with pytest.raises(InputError, match="chunked_attention"):
        of("qwen3", use_sliding_window=True, layer_types=["chunked_attention"] * 4)
    with pytest.raises(InputError, match="mixes"):
        of("mistral", layer_types=["full_attention", "sliding_attention"] * 2)


@pytest.mark.parametrize(
    "key", ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"]
)
@pytest.mark.parametrize("value", [None, 0, -1, 1.5, "many", True, [4], 2**40, float("nan")])
def test_senseless_sizes_are_named(key, value):
    with pytest.raises(FormatError, match=key) as error:
        from_hf({**LLAMA, key: value})
    assert error.value.field == key


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "two"}, "eos_token_id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id"),
        ({"rope_theta": 0.5}, "rope_theta"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 1.0}}, "low_freq_factor"),
    ],
)
def test_senseless_values_are_named(options, key):
    with pytest.raises(FormatError, match=key):
        from_hf({**LLAMA, **options})


def test_windows_of_each_kind():
    assert of("llama", sliding_window=64).windows == ()
    assert of("mistral").windows == (4096,) * 4
    assert of("mistral", sliding_window=None).windows == ()
    assert of("qwen2", sliding_window=64, max_window_layers=2).windows == ()
    assert of("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=2).windows == (None, None, 64, 64)
    assert of("gemma2", sliding_window=64).windows == (64, None, 64, None)
    assert of("gemma3_text", sliding_window=64, num_hidden_layers=7).windows == (64,) * 5 + (None, 64)
    assert of("gemma3_text", sliding_window=64, sliding_window_pattern=2).windows == (64, None, 64, None)


def test_old_and_new_forms_of_rope_are_one():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 128}
    expected = RopeConfig(500_000.0, "llama3", 8.0, 128, 1.0, 4.0)
    assert of("llama", rope_theta=500_000.0, rope_scaling={"rope_type": "llama3", **scaling}).rope == expected
    assert of("llama", rope_theta=500_000.0, rope_scaling={"type": "llama3", **scaling}).rope == expected
    assert of("llama", rope_parameters={"rope_type": "llama3", "rope_theta": 500_000.0, **scaling}).rope == expected


def test_a_local_rope_that_is_scaled_is_written_in_the_new_form():
    config = dataclasses.replace(of("gemma3_text"), local_rope=RopeConfig(1e4, "linear", 2.0))
    assert from_hf(to_hf(config)) == config


@pytest.mark.parametrize(
    ("model_type", "change", "named"),
    [
        ("llama", {"windows": (8,) * 4}, "windows"),
        ("llama", {"qk_norm": True}, "qk_norm"),
        ("llama", {"o_bias": True}, "_bias"),
        ("mistral", {"windows": (8, None, 8, 8)}, "windows"),
        ("gemma2", {"windows": (8, 16, 8, 8)}, "one window size"),
        ("gemma2", {"attention_scale": 0.3}, "attention_scale"),
        ("llama", {"architecture": "falcon"}, "falcon"),
    ],
)
def test_what_a_familys_config_cannot_express_is_not_written(model_type, change, named):
    with pytest.raises(InputError, match=named):
        to_hf(dataclasses.replace(of(model_type), **change))


def test_smollm2_is_a_llama():
    raw = {**LLAMA, "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    raw |= {
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000,
        "tie_word_embeddings": True,
    }
    expected = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, rope=RopeConfig(100_000.0), tie_embeddings=True)
    assert from_hf({**raw, "bos_token_id": None, "eos_token_id": None}) == expected
