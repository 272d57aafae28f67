"""Parameter counts: as published, as our decoder has them, as transformers' models have them."""

import dataclasses
import json

import pytest
import torch

from armillary.core.errors import InputError, NotFoundError
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.graph.architecture import Architecture, Latent, Mixture, from_config
from armillary.models.graph.find import find, read
from armillary.models.graph.parameters import active_parameters, embeddings, kv_bytes_per_token, parameters
from armillary.models.graph.published import architecture, published

SHAPE = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 40, "num_layers": 3, "num_heads": 4, "num_kv_heads": 2, "head_dim": 6}
CHANGES = [
    {},
    {"tie_embeddings": True},
    {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    {"qk_norm": True, "num_kv_heads": 1},
    {"sandwich_norms": True, "windows": (4, None, 4)},
]


@pytest.mark.parametrize("name", published())
def test_a_published_count_is_met(name):
    known = published()[name]
    counted = parameters(known.architecture)
    assert known.source
    if known.parameters % 10**7:
        assert counted == known.parameters
    elif known.parameters:
        assert counted == pytest.approx(known.parameters, rel=0.012)  # "13B" and "175B" are how their papers round


def test_smollm2_in_parts():
    model = architecture("smollm2-135m")
    assert (parameters(model) - embeddings(model), embeddings(model), parameters(model)) == (106_203_456, 28_311_552, 134_515_008)


def test_palms_table_to_its_last_digit():
    """8.63, 62.50 and 540.35 billion; with its 119 norms the largest would round to 540.36."""
    models = [architecture(f"palm-{size}") for size in ("8b", "62b", "540b")]
    assert [round((parameters(model) - (model.num_layers + 1) * model.hidden_size) / 1e7) for model in models] == [863, 6250, 54035]


def test_what_a_token_passes_through():
    deepseek, mixtral = architecture("deepseek-v3"), architecture("mixtral-8x7b")
    assert active_parameters(deepseek) == pytest.approx(36.6e9, rel=1e-3)  # README_WEIGHTS: with the head, without the embedding
    assert active_parameters(mixtral) + mixtral.vocab_size * mixtral.hidden_size == pytest.approx(12.9e9, rel=2e-3)  # its paper counts both
    assert active_parameters(architecture("smollm2-135m")) == 134_515_008


@pytest.mark.parametrize("changes", CHANGES)
def test_the_graph_counts_our_decoder(changes):
    config = ModelConfig("llama", max_context=64, **{**SHAPE, **changes})
    with torch.device("meta"):
        decoder = Decoder(config)
    held = sum(parameter.numel() for parameter in decoder.parameters())
    assert parameters(from_config(config)) == held == config.parameters()
    assert kv_bytes_per_token(from_config(config), "fp32") == config.kv_bytes_per_token()


def test_the_graph_counts_transformers_models():
    """Families that our decoder does not run, read from their configs, at their published widths with fewer layers."""
    import transformers

    few = {"num_hidden_layers": 2}
    deepseek = {"n_routed_experts": 16, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
    for config in (
        transformers.OPTConfig(hidden_size=9216, ffn_dim=36864, num_attention_heads=72, word_embed_proj_dim=9216, **few),
        transformers.GPT2Config(n_embd=12288, n_head=96, n_layer=2, n_positions=2048),
        transformers.FalconConfig(
            hidden_size=14848, num_attention_heads=232, num_kv_heads=8, new_decoder_architecture=True, tie_word_embeddings=False, **few
        ),
        transformers.FalconConfig(multi_query=True, **few),  # 7B
        transformers.MixtralConfig(**few),
        transformers.Qwen3MoeConfig(num_experts=16, **few),
        transformers.DeepseekV3Config(**deepseek, **few),
        transformers.DeepseekV2Config(**{**deepseek, "n_shared_experts": 2, "num_experts_per_tok": 6, "q_lora_rank": None}, **few),
    ):
        model = read(json.loads(config.to_json_string(use_diff=False)))
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(config)
        buffers = model.mixture.experts if model.mixture and model.mixture.router_bias else 0  # DeepSeek's selection bias
        assert parameters(model) == sum(parameter.numel() for parameter in built.parameters()) + buffers, config.model_type


def published_as(config, name):
    """The published architecture has every size that a config of its family has."""
    return dataclasses.replace(read(json.loads(config.to_json_string(use_diff=False))), name=name)


def test_transformers_defaults_are_the_published_shapes():
    import transformers

    assert published_as(transformers.DeepseekV3Config(max_position_embeddings=163840), "deepseek-v3") == architecture("deepseek-v3")
    mixtral = transformers.MixtralConfig(max_position_embeddings=32768)
    assert published_as(mixtral, "mixtral-8x7b") == architecture("mixtral-8x7b")


def test_a_model_is_found_by_name_path_or_config(tmp_path):
    assert find("LLaMA-2-7B") is architecture("llama-2-7b")
    folder = tmp_path / "mine"
    folder.mkdir()
    config = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 24, "n_head": 4, "n_layer": 2, "n_positions": 16}
    (folder / "config.json").write_text(json.dumps(config))
    for path in (folder, folder / "config.json"):
        assert (find(str(path)).name, find(str(path)).intermediate_size) == ("mine", 96)
    with pytest.raises(NotFoundError, match=r"llama-2-70b"):
        find("llama-2-70")
    with pytest.raises(InputError, match="known: opt"):
        read({"model_type": "bert"})
    with pytest.raises(InputError, match="OPT with norms after"):
        read({"model_type": "opt", "hidden_size": 8, "do_layer_norm_before": False})


def test_bytes_of_the_cache():
    assert kv_bytes_per_token(architecture("llama-2-70b")) == 327_680
    assert kv_bytes_per_token(architecture("smollm2-135m"), "fp32") == 46_080
    assert 512 * kv_bytes_per_token(architecture("opt-66b")) / 2**30 == pytest.approx(1.13, abs=0.006)  # DistServe's "1.13 GB" are GiB
    assert kv_bytes_per_token(architecture("deepseek-v3"), "bf16") == 61 * 576 * 2
    many_heads = dataclasses.replace(architecture("deepseek-v3"), latent=None)
    assert kv_bytes_per_token(many_heads) // kv_bytes_per_token(architecture("deepseek-v3")) == 32768 // 576


def test_longest_contexts_of_pope_et_al():
    """Table 1: 30 % of 32 GiB on each of 64 chips, multiquery sharded over the batch, else copied; multihead over its 48 heads."""
    budget = 0.3 * 32 * 2**30
    multiquery, multihead = architecture("palm-540b"), architecture("palm-540b-multihead")
    for batch, published_context in ((128, 43_000), (512, 10_700)):
        assert budget * 64 / batch / kv_bytes_per_token(multiquery) == pytest.approx(published_context, rel=0.01)
    for batch, published_context in ((128, 660), (512, 165)):
        assert budget / batch / kv_bytes_per_token(multiquery) == pytest.approx(published_context, rel=0.01)
    for batch, published_context in ((128, 1320), (512, 330)):
        assert budget * 48 / batch / kv_bytes_per_token(multihead) == pytest.approx(published_context, rel=0.011)


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(NotFoundError, match=r"llama-2-70b"):
        architecture("llama2-70b")


def test_shapes_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="multiple of num_kv_heads"):
        Architecture("x", max_context=8, **{**SHAPE, "num_kv_heads": 3})
    with pytest.raises(InputError, match="one a layer"):
        Architecture("x", max_context=8, windows=(4,), **SHAPE)
    with pytest.raises(InputError, match="top_k must be"):
        Architecture("x", max_context=8, mixture=Mixture(4, 5, 8), **SHAPE)
    assert Architecture("x", max_context=8, latent=Latent(8, 2, 4, 4), **{**SHAPE, "num_kv_heads": 3})
