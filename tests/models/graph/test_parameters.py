"""Parameter counts: as published, as our decoder has them, as transformers' models have them."""

import dataclasses

import pytest
import torch

from armillary.core.errors import InputError, NotFoundError
from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.models.graph.architecture import Architecture, Latent, Mixture, from_config
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


def test_palm_is_540_35_billion():
    assert parameters(architecture("palm-540b")) // 10**7 * 10**7 == 540_350_000_000


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
    """Families that our decoder does not run, at their published widths with fewer layers."""
    import transformers

    deepseek, falcon = architecture("deepseek-v3"), architecture("falcon-180b")
    opt, gpt3, mixtral = architecture("opt-66b"), architecture("gpt3-175b"), architecture("mixtral-8x7b")

    def few(model):
        return dataclasses.replace(model, num_layers=2, windows=())

    shallow = dataclasses.replace(deepseek, num_layers=2, mixture=dataclasses.replace(deepseek.mixture, dense_layers=1, experts=16))
    pairs = [
        (few(opt), transformers.OPTConfig, {"ffn_dim": opt.intermediate_size, "word_embed_proj_dim": opt.hidden_size}),
        (few(gpt3), transformers.GPT2Config, {"n_positions": 2048}),
        (few(falcon), transformers.FalconConfig, {"new_decoder_architecture": True, "num_kv_heads": 8, "tie_word_embeddings": False}),
        (few(mixtral), transformers.MixtralConfig, {"num_key_value_heads": 8}),
        (
            shallow,
            transformers.DeepseekV3Config,
            {"n_routed_experts": 16, "first_k_dense_replace": 1, "num_key_value_heads": 128, "n_group": 4, "topk_group": 2},
        ),
    ]
    for model, family, more in pairs:
        config = family(
            vocab_size=model.vocab_size,
            hidden_size=model.hidden_size,
            num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads,
            **(
                {}
                if family is transformers.OPTConfig or family is transformers.GPT2Config
                else {"intermediate_size": model.intermediate_size}
            ),
            **more,
        )
        with torch.device("meta"):
            built = transformers.AutoModelForCausalLM.from_config(config)
        assert parameters(model) == sum(parameter.numel() for parameter in built.parameters()) + (
            model.mixture.experts if model.mixture and model.mixture.router_bias else 0  # a buffer there
        ), family.__name__


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
