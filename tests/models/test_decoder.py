import copy
import dataclasses

import pytest
import torch

from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.models.families import from_hf
from armillary.models.weights import assemble, hf_parameters

TINY = ModelConfig("llama", 61, 24, 40, 2, 4, 2, 6, 128, tie_embeddings=True)


def ours(peer):
    """The same weights in our decoder. A copy: neither model sees the other's changes."""
    config = from_hf(peer.config.to_dict())
    tensors = {name: parameter.detach().clone() for name, parameter in peer.named_parameters()}
    return assemble(config, tensors, tensors.__getitem__)


def run(decoder, tokens, lengths=None, rows=None):
    lengths = lengths or [len(tokens)]
    positions = torch.cat([torch.arange(length) for length in lengths])
    return decoder(tokens, positions, CausalAttend(lengths), rows)


def test_equals_transformers(peer):
    # 200 tokens: past every sliding window (9) and every original context (32) of the cases.
    tokens = torch.randint(1, 131, (200,), generator=torch.Generator().manual_seed(1))
    decoder = ours(peer)
    with torch.no_grad():
        expected = peer(tokens[None]).logits[0]
        actual = run(decoder, tokens)
    assert expected.std() > 0.05  # the comparison means something
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_every_option_shows_in_the_logits(make_peer):
    """Else equality with transformers would prove nothing about it."""
    without = {
        "llama3": {"rope": RopeConfig(5000.0)},
        "llama-linear": {"rope": RopeConfig(1e4)},
        "llama-yarn": {"rope": RopeConfig(1000.0)},
        "mistral": {"windows": ()},
        "gemma": {"activation": "silu"},
        "gemma2": {"windows": (9, 9, 9)},
        "gemma3": {"local_rope": None},
    }
    cases = [
        *without.items(),
        ("gemma2", {"attention_softcap": None}),
        ("gemma2", {"logit_softcap": None}),
        ("gemma2", {"attention_scale": None}),
    ]
    for name, change in cases:
        decoder, tokens = ours(make_peer(name)), torch.randint(1, 131, (100,))
        changed = Decoder(dataclasses.replace(decoder.config, **change))
        changed.load_state_dict(decoder.state_dict())
        with torch.no_grad():
            assert (run(decoder, tokens) - run(changed, tokens)).abs().max() > 1e-3, (name, change)


def test_parameters_in_closed_form(peer):
    decoder = ours(peer)
    assert decoder.config.parameters() == sum(p.numel() for p in decoder.parameters()) == sum(p.numel() for p in peer.parameters())


def test_parameters_of_smollm2():
    config = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tie_embeddings=True)
    with torch.device("meta"):
        decoder = Decoder(config)
    embedding = decoder.embed_tokens.weight.numel()
    assert (config.parameters() - embedding, embedding, config.parameters()) == (106_203_456, 28_311_552, 134_515_008)
    assert sum(p.numel() for p in decoder.parameters()) == 134_515_008


def test_packed_sequences_equal_each_alone(peer):
    decoder = ours(peer)
    lengths = [17, 1, 30]
    sequences = [torch.randint(1, 131, (length,)) for length in lengths]
    with torch.no_grad():
        packed = run(decoder, torch.cat(sequences), lengths)
        alone = torch.cat([run(decoder, sequence) for sequence in sequences])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)


def test_rows_are_a_selection_of_all_logits():
    decoder, tokens = Decoder(TINY), torch.randint(61, (12,))
    rows = torch.tensor([11, 0, 5])
    torch.testing.assert_close(run(decoder, tokens, [5, 7], rows), run(decoder, tokens, [5, 7])[rows])


def test_head_of_hidden_is_the_logits():
    decoder, tokens = Decoder(TINY), torch.randint(61, (7,))
    hidden = decoder.hidden(tokens, torch.arange(7), CausalAttend([7]))
    assert hidden.shape == (7, 24)
    assert torch.equal(decoder.head(hidden), run(decoder, tokens))


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gemma2", "gemma3"])
def test_gradients_equal_transformers(name, make_peer):
    peer = make_peer(name)
    decoder, tokens = ours(peer), torch.randint(1, 131, (40,))
    torch.nn.functional.cross_entropy(peer(tokens[None]).logits[0, :-1], tokens[1:]).backward()
    torch.nn.functional.cross_entropy(run(decoder, tokens)[:-1], tokens[1:]).backward()
    theirs = dict(peer.named_parameters())
    for parameter_name, parameter in hf_parameters(decoder).items():
        torch.testing.assert_close(
            parameter.grad, theirs[parameter_name].grad, atol=2e-5, rtol=2e-4, msg=lambda m, n=parameter_name: f"{n}: {m}"
        )


def test_a_run_in_inference_mode_does_not_spoil_training():
    decoder, tokens = Decoder(TINY), torch.randint(61, (9,))
    with torch.inference_mode():
        run(decoder, tokens)
    run(decoder, tokens).sum().backward()
    assert all(p.grad is not None for p in decoder.parameters())


def test_a_tied_head_stays_tied_through_training_copying_and_casting():
    decoder = copy.deepcopy(Decoder(TINY)).to(torch.float64)
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    run(decoder, torch.randint(61, (9,))).pow(2).sum().backward()
    optimizer.step()
    assert decoder.lm_head.weight is decoder.embed_tokens.weight


def test_bfloat16_keeps_exact_rope_angles_and_follows_float32(llama_peer):
    decoder = ours(llama_peer)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.mul_(0.5)
        tokens = torch.randint(131, (100,))
        full = run(decoder, tokens)
        half = run(decoder.to(torch.bfloat16), tokens)
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.05 * full.norm()


def test_a_layers_projections_can_be_replaced_by_one_packed_product():
    class Packed(torch.nn.Module):
        def __init__(self, fused):
            super().__init__()
            self.weight = torch.cat([getattr(fused, name).weight for name in fused.names])
            self.sizes = fused.out_features

        def forward(self, x):
            return (x @ self.weight.T).split(self.sizes, -1)

    decoder, tokens = Decoder(TINY), torch.randint(61, (9,))
    with torch.no_grad():
        expected = run(decoder, tokens)
        for layer in decoder.layers:
            layer.self_attn.qkv, layer.mlp.gate_up = Packed(layer.self_attn.qkv), Packed(layer.mlp.gate_up)
        torch.testing.assert_close(run(decoder, tokens), expected)
