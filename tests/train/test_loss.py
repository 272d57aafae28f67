"""The chunked head and loss against the three plain lines, and what it never allocates."""

import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from armillary.train.loss import linear_cross_entropy, plain_cross_entropy
from armillary.train.microbatch import IGNORED


def inputs(tokens=37, size=16, vocabulary=53, ignored=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, size, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, size, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, vocabulary, (tokens,), generator=generator)
    targets[torch.rand(tokens, generator=generator) < ignored] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk", [1, 10, 37, 256])
def test_equals_the_plain_loss_and_its_gradients(chunk, ignored, softcap):
    hidden, weight, targets = inputs(ignored=ignored)
    results = []
    for loss in (linear_cross_entropy(hidden, weight, targets, softcap, chunk), plain_cross_entropy(hidden, weight, targets, softcap)):
        results.append((loss, *torch.autograd.grad(loss * 0.125, (hidden, weight))))
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-6, atol=1e-6)


def test_the_exact_gradient_is_that_of_float64():
    hidden, weight, targets = inputs(tokens=9)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    plain = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, ignore_index=IGNORED, reduction="sum")
    expected = torch.autograd.grad(plain, exact)
    made = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, chunk=4), (hidden, weight))
    for a, b in zip(made, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("frozen", [0, 1])
def test_what_needs_no_gradient_gets_none(frozen):
    pair = list(inputs()[:2])
    targets = inputs()[2]
    pair[frozen] = pair[frozen].detach()
    linear_cross_entropy(*pair, targets).backward()
    assert pair[frozen].grad is None
    assert pair[1 - frozen].grad is not None


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation makes; views are none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {given.untyped_storage().data_ptr() for given in args if isinstance(given, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() not in given:
                self.elements = max(self.elements, made.numel())
        return out


def test_a_target_outside_the_vocabulary_is_refused():
    hidden, weight, targets = inputs(ignored=0.0)
    targets[5] = len(weight)
    with pytest.raises((IndexError, RuntimeError), match=r"vocabulary|out of bounds"):
        linear_cross_entropy(hidden, weight, targets)


def test_a_second_backward_pass_is_refused():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):  # which torch's own check does not see through
        loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a second backward pass"):
        loss.backward()


@pytest.mark.parametrize("size", [24, 32])  # without and with the compiled loop
def test_without_gradients_none_is_computed(size):
    hidden, weight, targets = inputs(32, size, 3001, 0.0)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
    with Largest() as seen, torch.no_grad():
        found = linear_cross_entropy(hidden, weight, targets, chunk=16)
    assert found == loss
    assert seen.elements <= 16 * 3001 < weight.numel()


@pytest.mark.parametrize("chunk", [1 << 31, 1 << 32, sys.maxsize])
def test_a_chunk_of_any_size_holds_all_tokens(chunk):
    hidden, weight, targets = inputs(5, 16, 9, 0.0)
    assert linear_cross_entropy(hidden, weight, targets, chunk=chunk) == linear_cross_entropy(hidden, weight, targets, chunk=5)


@pytest.mark.parametrize("size", [8, 16])  # without and with the compiled loop
@pytest.mark.parametrize("tokens", [64, 640])
def test_no_tensor_is_larger_than_a_chunk_of_logits(tokens, size):
    vocabulary, chunk = 3001, 16
    hidden, weight, targets = inputs(tokens, size, vocabulary, 0.0)
    with Largest() as seen:
        linear_cross_entropy(hidden, weight, targets, chunk=chunk).backward()
    assert seen.elements == chunk * vocabulary  # whatever the number of tokens; the plain one makes tokens * vocabulary
    with Largest() as plain:
        plain_cross_entropy(hidden, weight, targets).backward()
    assert plain.elements == tokens * vocabulary


def test_what_is_kept_for_backward_is_the_gradients_alone():
    hidden, weight, targets = inputs(200, 8, 1000, 0.0)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        linear_cross_entropy(hidden, weight, targets, chunk=16)
    assert kept == [hidden.numel(), weight.numel()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_sums_in_float32(dtype):
    hidden, weight, targets = inputs(400, ignored=0.0, dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets, chunk=16)
    exact = plain_cross_entropy(hidden.double(), weight.double(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=5e-3)
    loss.backward()
    assert weight.grad.dtype == dtype
    expected = torch.autograd.grad(exact, weight)[0].double()
    assert (weight.grad.double() - expected).norm() < 1e-2 * expected.norm()
