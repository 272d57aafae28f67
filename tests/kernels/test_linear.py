"""Linear layers: oneDNN's products equal the exact ones, forward and backward, and several layers of one input stay what they are."""

import pytest
import torch
from torch.nn import functional

from armillary.kernels import linear
from armillary.kernels.linear import FusedLinear, Linear
from armillary.kernels.training_library import library


@pytest.fixture
def onednn(monkeypatch):
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: True)


def node(y):
    return type(y.grad_fn).__name__


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "columns"), [((1, 1), 1), ((5, 24), 7), ((37, 96), 40), ((2, 3, 16), 6), ((64, 576), 192), ((9,), 4), ((0, 4), 3)]
)
def test_products_and_gradients_are_the_exact_ones(onednn, shape, columns, bias):
    torch.manual_seed(0)
    layer = Linear(shape[-1], columns, bias=bias)
    x = torch.randn(shape, requires_grad=True)
    inputs = [x, *layer.parameters()]
    y = layer(x)
    assert (node(y) == "_OneDNNLinearBackward") == (x.numel() > 0)
    exact_inputs = [t.detach().double().requires_grad_() for t in inputs]
    exact = functional.linear(*exact_inputs)
    upstream = torch.randn_like(y)
    slopes, exact_slopes = torch.autograd.grad(y, inputs, upstream), torch.autograd.grad(exact, exact_inputs, upstream.double())
    for found, wanted in zip((y, *slopes), (exact, *exact_slopes), strict=True):
        assert found.shape == wanted.shape
        torch.testing.assert_close(found.double(), wanted, rtol=1e-6, atol=2e-6 * shape[-1] ** 0.5)


def test_views_of_any_strides_are_taken(onednn):
    torch.manual_seed(0)
    layer = Linear(8, 5, bias=False)
    for x in (torch.randn(8, 6).T, torch.randn(6, 24)[:, 8:16], torch.randn(6, 24)[:, ::3]):
        torch.testing.assert_close(layer(x), functional.linear(x, layer.weight), rtol=1e-6, atol=1e-6)
        y, slope = layer(x), torch.ones(5, 6).T
        found, wanted = (torch.autograd.grad(out, layer.weight, slope)[0] for out in (y, functional.linear(x, layer.weight)))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_what_is_frozen_gets_no_gradient(onednn):
    layer, x = Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    layer.weight.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.weight.grad is None
    assert torch.equal(layer.bias.grad, torch.full((3,), 2.0))
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 4))


def test_nan_comes_through(onednn):
    x = torch.ones(3, 16)
    x[1, 2] = torch.nan
    assert Linear(16, 4)(x).isnan().any(1).tolist() == [False, True, False]


def test_only_training_of_ordinary_float32_layers_takes_them(onednn):
    layer, x = Linear(4, 3), torch.randn(2, 4)
    assert node(layer(x)) == "_OneDNNLinearBackward"
    with torch.no_grad():
        assert torch.equal(layer(x), functional.linear(x, layer.weight, layer.bias))
    assert node(layer.double()(x.double())) != "_OneDNNLinearBackward"
    assert node(layer.float().eval()(x)) != "_OneDNNLinearBackward"


@pytest.mark.parametrize(
    ("vendor", "flags", "faster"),
    [("AuthenticAMD", {"avx512f"}, True), ("AuthenticAMD", {"avx2"}, False), ("GenuineIntel", {"avx512f"}, False), ("", set(), False)],
)
def test_the_rule_is_for_the_processors_where_mkl_is_slow(vendor, flags, faster, monkeypatch):
    monkeypatch.setattr(linear, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(linear, "cpu_info", lambda: ("", frozenset(flags)))
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert linear.onednn_is_faster.__wrapped__() is faster


@pytest.mark.parametrize("bias", [False, True])
def test_each_output_is_its_own_projection(bias):
    fused = FusedLinear(("q_proj", "k_proj"), 6, (4, 2), bias)
    x = torch.randn(3, 6)
    q, k = fused(x)
    assert torch.equal(q, fused.q_proj(x))
    assert torch.equal(k, fused.k_proj(x))
    assert sorted(fused.state_dict()) == sorted(
        f"{n}.{p}" for n in ("q_proj", "k_proj") for p in (("weight", "bias") if bias else ("weight",))
    )


def test_names_and_sizes_must_match():
    with pytest.raises(ValueError, match="shorter"):
        FusedLinear(("q_proj", "k_proj"), 6, (4,))


@pytest.mark.parametrize("rows", [0, 1, 15, 16, 17, 50])
@pytest.mark.parametrize("columns", [1, 16, 31, 64])
def test_a_transposed_matrix_is_the_same_numbers_in_rows(rows, columns):
    x = torch.randn(columns, rows).T  # of any strides
    y = linear._transposed(x)
    assert torch.equal(y, x.T)
    assert library() is None or y.is_contiguous()


def test_an_input_of_another_width_is_refused_with_both_shapes(onednn):
    with pytest.raises(RuntimeError, match="3x32 and 64x48"):
        Linear(64, 48)(torch.ones(3, 32))
