import pytest
import torch

from armillary.core.errors import InputError
from armillary.kernels import attention
from armillary.kernels.attention import AttentionSpec, varlen_attention


def tensors(tokens, heads, kv_heads, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, n, size, generator=generator) for n in (heads, kv_heads, kv_heads)]


@pytest.mark.parametrize("lengths", [[1], [11], [5, 5, 5], [7, 1, 12], [0, 4, 0, 3]])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_varlen_attention_equals_the_plainest_loop(monkeypatch, lengths, heads, window, softcap):
    monkeypatch.setattr(attention, "QUERY_BLOCK", 4)  # so that short sequences meet block borders too
    spec = AttentionSpec(0, 0.7, window, softcap)
    q, k, v = tensors(sum(lengths), *heads)
    expected = attention.reference_attention(spec, q, k, v, lengths)
    assert torch.allclose(varlen_attention(spec, q, k, v, lengths).double(), expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_equal_those_of_the_plainest_loop(window, softcap):
    spec, lengths = AttentionSpec(0, 0.5, window, softcap), [4, 6]
    grads = []
    for function in (varlen_attention, attention.reference_attention):
        inputs = [x.double().requires_grad_() for x in tensors(10, 4, 2)]
        function(spec, *inputs, lengths).pow(2).sum().backward()
        grads.append([x.grad for x in inputs])
    for ours, theirs in zip(*grads, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-9)


def test_no_tokens_give_no_rows():
    assert varlen_attention(AttentionSpec(0, 1.0), *tensors(0, 4, 2), []).shape == (0, 4, 8)


@pytest.mark.parametrize("lengths", [[3], [6, -1], [2, 4]])
def test_lengths_that_do_not_add_up_are_refused(lengths):
    with pytest.raises(InputError, match="5 tokens"):
        varlen_attention(AttentionSpec(0, 1.0), *tensors(5, 2, 1), lengths)
