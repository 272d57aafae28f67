"""Tiny random models of every family, made by transformers: the peer that ours must equal."""

import sys
from pathlib import Path

import pytest
import torch

from armillary.models.load import LoadedModel, load

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))  # the adapters that the tests of both rings write

SIZES = {
    "vocab_size": 131,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
}
GEMMA = {**SIZES, "head_dim": 16, "tie_word_embeddings": True}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}

# name: (transformers' config class, its options)
CASES = {
    "llama2": ("LlamaConfig", {**SIZES, "num_key_value_heads": 4}),
    "llama3": ("LlamaConfig", {**SIZES, "rope_parameters": LLAMA3, "eos_token_id": [2, 7], "head_dim": 12}),
    "smollm2": (
        "LlamaConfig",
        {**SIZES, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    ),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("LlamaConfig", {**SIZES, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
    "llama-yarn": ("LlamaConfig", {**SIZES, "rope_parameters": YARN}),
    "llama-yarn-mscale": (
        "LlamaConfig",
        {
            **SIZES,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
        },
    ),
    "llama-yarn-factor": ("LlamaConfig", {**SIZES, "rope_parameters": {**YARN, "attention_factor": 0.9}}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 9}),
    "mistral-full-mqa": ("MistralConfig", {**SIZES, "sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2Config", SIZES),
    "qwen2-window": ("Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {**SIZES, "head_dim": 16, "tie_word_embeddings": True}),
    "qwen3-biases": ("Qwen3Config", {**SIZES, "head_dim": 12, "attention_bias": True}),
    "gemma": ("GemmaConfig", GEMMA),
    "gemma2": (
        "Gemma2Config",
        {**GEMMA, "sliding_window": 9, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 0.3},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **GEMMA,
            "sliding_window": 9,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
}


def make_peer(name):
    """A transformers model of the case with weights large enough that every option shows in the logits."""
    transformers = pytest.importorskip("transformers", reason="transformers is the peer: pip install 'armillary[dev]'")
    class_name, options = CASES[name]
    config = getattr(transformers, class_name)(**options, attn_implementation="eager")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


@pytest.fixture(params=CASES)
def peer(request):
    return make_peer(request.param)


@pytest.fixture
def llama_peer():
    return make_peer("llama3")


@pytest.fixture(name="make_peer")
def make_peer_fixture():
    return make_peer


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """The real model, pulled into the user's cache at first use. Tests that ask for it are slow ones."""
    return load("smollm2")
