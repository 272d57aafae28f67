"""The compiled loops of a training step: each equals its plain version in float64, forward and backward, and steps aside for all else."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import grad
from torch.nn import functional

from armillary.core.cpu import cpu_info
from armillary.core.errors import InputError
from armillary.kernels import token_loss, training_library
from armillary.kernels.attention import AttentionSpec, reference_attention, varlen_attention
from armillary.kernels.gated import gated
from armillary.kernels.norm import rms_norm
from armillary.kernels.rope import apply_rope, rope_angles

pytestmark = pytest.mark.skipif(
    training_library.library() is None, reason="without a C++ compiler or AVX2 there are no compiled loops to test: torch's run"
)


@pytest.fixture(params=["native, 1 thread", "native, 2 threads", "avx2, 2 threads"], autouse=True)
def machine(request, monkeypatch):
    isa, threads = request.param.split(", ")
    library = training_library.library
    if isa == "avx2":
        if not {"avx2", "fma", "f16c"} <= cpu_info()[1]:
            pytest.skip("not to be had here")
        monkeypatch.setenv("ARMILLARY_ISA", isa)
        library.cache_clear()
    before = torch.get_num_threads()
    torch.set_num_threads(int(threads[0]))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    if isa == "avx2":
        library.cache_clear()


def check(function, *inputs, node, tolerance=2e-6):
    """Ours in float32 against the same function in float64, where torch's own operations run: values and gradients."""
    ours, exact = ([x.detach().to(dtype).requires_grad_() for x in inputs] for dtype in (torch.float32, torch.float64))
    results = [made if isinstance(made, tuple) else (made,) for made in (function(*ours), function(*exact))]
    assert node in type(results[0][0].grad_fn).__name__
    assert node not in type(results[1][0].grad_fn).__name__
    upstream = [torch.randn_like(y) for y in results[0]]
    slopes = grad(results[0], ours, upstream), grad(results[1], exact, [u.double() for u in upstream])
    for a, b, allowed in (
        *((a, b, tolerance / 2) for a, b in zip(*results, strict=True)),
        *((a, b, tolerance) for a, b in zip(*slopes, strict=True)),
    ):
        assert (a - b).abs().max() <= allowed * max(1.0, b.abs().max())


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 16), (37, 64), (5, 3, 48)])
def test_rms_norm(shape, offset):
    check(lambda x, w: rms_norm(x, w, 1e-5, offset), torch.randn(shape), torch.randn(shape[-1]), node="_RMSNorm")


@pytest.mark.parametrize("size", [32, 64, 96])
def test_rope(size):
    angles = rope_angles(torch.arange(9) * 7, torch.rand(size // 2), 1.0, torch.float32)
    angles64 = tuple(a.double() for a in angles)
    check(
        lambda q, k: apply_rope(q, k, *(angles if q.dtype == torch.float32 else angles64)),
        torch.randn(9, 4, size), torch.randn(9, 2, size), node="_Rope",
    )  # fmt: skip


def test_angles_that_are_learned_have_their_gradient():
    x, (cos, sin) = torch.randn(9, 2, 32), rope_angles(torch.arange(9), torch.rand(16), 1.0, torch.float32)
    for learned in (cos, sin):
        learned.requires_grad_()
        (slope,) = grad(apply_rope(x.requires_grad_(), x, cos, sin)[0].sum(), learned)
        expected = (x if learned is cos else x.roll(16, -1)).sum(1, keepdim=True)
        torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("shape", [(3,), (7, 37), (2, 64)])
def test_swiglu(shape):
    check(gated, 4 * torch.randn(shape), torch.randn(shape), node="_SwiGLU")


def test_swiglu_far_out():
    gate = torch.tensor([-3e38, -1e38, -1e4, -90.0, -88.0, -1e-30, 0.0, 90.0, 1e4])
    check(gated, gate, torch.ones(9), node="_SwiGLU")
    assert gated(torch.tensor([-torch.inf], requires_grad=True), torch.ones(1)).isnan()  # as torch's: an overflow is not made to vanish


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 2, 16), (3, 3, 64), (6, 1, 80)])
@pytest.mark.parametrize("lengths", [(1,), (5,), (1, 2, 3), (96,), (97,), (100, 17, 200), (256, 256), (0, 7, 0)])
def test_causal_attention(lengths, heads, kv_heads, size):
    q, k, v = (torch.randn(sum(lengths), count, size) for count in (heads, kv_heads, kv_heads))
    spec = AttentionSpec(0, size**-0.5)
    check(lambda q, k, v: varlen_attention(spec, q, k, v, lengths), q, k, v, node="_CausalAttention")


@pytest.mark.parametrize("scale", [30.0, -30.0])
def test_attention_against_the_plainest_loop_with_scores_that_overflow_an_exponential(scale):
    q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
    spec = AttentionSpec(0, scale)
    ours = varlen_attention(spec, q.requires_grad_(), k, v, (13, 7))
    assert "_CausalAttention" in type(ours.grad_fn).__name__
    # Scores reach several hundred, where a float32 score itself is only good to 3e-5.
    torch.testing.assert_close(ours.double(), reference_attention(spec, q, k, v, (13, 7)), rtol=0, atol=2e-4)


def test_a_window_that_sees_everything_is_causal_attention_and_others_are_not():
    q, k, v = (torch.randn(20, 2, 16, requires_grad=True) for _ in range(3))
    nodes = {window: type(varlen_attention(AttentionSpec(0, 0.25, window), q, k, v, (20,)).grad_fn).__name__ for window in (None, 20, 19)}
    assert ["_CausalAttention" in nodes[window] for window in (None, 20, 19)] == [True, True, False]


@pytest.mark.parametrize(("tokens", "size", "vocabulary"), [(1, 16, 2), (37, 48, 130), (70, 80, 257), (200, 64, 61)])
@pytest.mark.parametrize("chunk", [7, 64, 256])
def test_linear_cross_entropy(tokens, size, vocabulary, chunk):
    hidden, weight, targets = torch.randn(tokens, size), torch.randn(vocabulary, size), torch.randint(0, vocabulary, (tokens,))
    exact = [x.double().requires_grad_() for x in (hidden, weight)]
    total = functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    slopes = grad(total, exact)
    for needed in itertools.product((True, False), repeat=2):
        made = token_loss.linear_cross_entropy(hidden, weight, targets, chunk, needed)
        for found, wanted, asked in zip(made, (total, *slopes), (True, *needed), strict=True):
            assert (found is None) == (not asked)
            assert not asked or (found - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max())


def test_linear_cross_entropy_far_out():
    hidden, weight = torch.full((2, 16), 30.0), torch.randn(5, 16)
    weight[3] = -100.0
    targets = torch.tensor([3, 0])
    loss, slope, _ = token_loss.linear_cross_entropy(hidden, weight, targets, 256, (True, True))
    torch.testing.assert_close(
        loss.double(), functional.cross_entropy(hidden.double() @ weight.double().T, targets, reduction="sum"), rtol=1e-6, atol=0
    )
    assert slope.isfinite().all()
    hidden[0, 1] = torch.nan
    assert token_loss.linear_cross_entropy(hidden, weight, targets, 256, (False, False))[0].isnan()


def step(x, weight, cos, sin, lengths):
    """Values and gradients of all the loops in a row."""
    normed = rms_norm(x, weight, 1e-5)
    q, k = apply_rope(normed.view(-1, 2, 32), normed.view(-1, 2, 32), cos, sin)
    mixed = varlen_attention(AttentionSpec(0, 0.2), q, k, x.unflatten(-1, (2, 32)), lengths)
    out = gated(mixed.flatten(1), x)
    return (out, *grad(out.square().sum(), (x, weight)))


def test_a_result_repeats_bit_for_bit():
    x, weight = torch.randn(200, 64, requires_grad=True), torch.randn(64, requires_grad=True)
    angles = rope_angles(torch.arange(200), torch.rand(16), 1.0, torch.float32)
    first, *others = (step(x, weight, *angles, (150, 50)) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_python_threads_do_not_share_scratch_space():
    angles = rope_angles(torch.arange(200), torch.rand(16), 1.0, torch.float32)
    inputs = [(torch.randn(count, 64, requires_grad=True), torch.randn(64, requires_grad=True)) for count in (200, 150, 60)]

    def made(x, weight):
        return step(x, weight, angles[0][: len(x)], angles[1][: len(x)], (len(x) - 50, 50))

    alone = [made(*pair) for pair in inputs]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda pair: made(*pair), inputs * 5))
    for results, expected in zip(together, alone * 5, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("layout", [lambda x: x.T.contiguous().T, lambda x: torch.stack((x, x * torch.nan), -1)[..., 0]])
def test_the_layout_in_memory_does_not_matter(layout):
    angles = rope_angles(torch.arange(60), torch.rand(16), 1.0, torch.float32)
    x, weight = torch.randn(60, 64), torch.randn(64)
    expected = step(x.requires_grad_(), weight.requires_grad_(), *angles, (40, 20))
    strided = layout(x.detach()).requires_grad_()
    assert not strided.is_contiguous()
    for a, b in zip(step(strided, weight, *angles, (40, 20)), expected, strict=True):
        assert torch.equal(a, b)


def test_nan_comes_through():
    angles = rope_angles(torch.arange(4), torch.rand(16), 1.0, torch.float32)
    x = torch.randn(4, 64)
    x[2, 5] = torch.nan
    out, slope, weight_slope = step(x.requires_grad_(), torch.ones(64, requires_grad=True), *angles, (4,))
    assert out[2].isnan().any()
    assert slope[2].isnan().any()
    assert weight_slope.isnan().any()


def test_nothing_at_all_is_no_error():
    angles = rope_angles(torch.arange(0), torch.rand(16), 1.0, torch.float32)
    x, weight = torch.randn(0, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    normed = rms_norm(x, weight, 1e-5)
    rotated = apply_rope(normed.view(-1, 2, 32), x.view(-1, 2, 32), *angles)[0]
    slope, weight_slope = grad(gated(rotated.flatten(1), x).sum(), (x, weight))
    assert slope.shape == (0, 64)
    assert torch.equal(weight_slope, torch.zeros(64))


def test_shapes_that_do_not_belong_together_are_refused():
    x = torch.randn(4, 2, 32)
    operators = torch.ops.armillary
    with pytest.raises(InputError, match="last dimension"):
        operators.rms_norm(x, torch.ones(16), 1e-5)
    with pytest.raises(InputError, match="last dimension"):
        operators.rms_norm(torch.randn(4, 24), torch.ones(24), 1e-5)
    with pytest.raises(InputError, match="angles"):
        operators.rope(x, torch.ones(3, 1, 32), torch.ones(3, 1, 32), False)
    with pytest.raises(InputError, match="one shape"):
        operators.swiglu(x, x[:1])
    targets, logits = torch.zeros(4, dtype=torch.int64), torch.empty(16 * 9)
    loss = operators.linear_cross_entropy
    for hidden, weight, target, room in (
        (x[:, 0], torch.ones(9, 16), targets, logits),
        (x[:3, 0], torch.ones(9, 32), targets, logits),
        (x[:, 0], torch.ones(9, 32), targets, logits[:100]),
        (x[:, 0], torch.ones(9, 32), targets.float(), logits),
    ):
        with pytest.raises(InputError, match="one loss"):
            loss(hidden, weight, target, room, 16, True, True)
    for target in (-1, 9):
        with pytest.raises(IndexError, match="vocabulary of 9"):
            loss(x[:, 0], torch.ones(9, 32), targets + target, logits, 16, True, True)
    for k, lengths in ((x, [3]), (x, [5, -1]), (x[:3], [4]), (torch.randn(4, 3, 32), [4]), (x[..., :16], [4]), (x[:, :0], [4])):
        with pytest.raises(InputError, match="share tokens"):
            operators.causal_attention(x, k, k, lengths, 1.0)


def shapes(results):
    return [tuple(result.shape) for result in results]


def test_operators_have_fakes_so_they_trace():
    def run():
        x, up = torch.ones(5, 64), torch.ones(5, 64)
        q, k = torch.ones(5, 4, 32), torch.ones(5, 2, 32)
        operators = torch.ops.armillary
        normed, inverse = operators.rms_norm(x, x[0], 1e-5)
        out, kept = operators.causal_attention(q, k, k, [2, 3], 1.0)
        return [
            normed, inverse, *operators.rms_norm_backward(x, x[0], inverse, up), operators.swiglu(x, up), *operators.swiglu_backward(x, up, up),
            operators.rope(q, torch.ones(5, 1, 32), torch.ones(5, 1, 32), True), out, kept,
            *operators.causal_attention_backward(q, k, k, out, kept, q, [2, 3], 1.0),
            *operators.linear_cross_entropy(x, torch.ones(9, 64), torch.zeros(5, dtype=torch.int64), torch.ones(144), 16, True, False),
        ]  # fmt: skip

    real = shapes(run())
    with FakeTensorMode():
        assert shapes(run()) == real


class Wrapped(torch.Tensor):
    """A stand-in for DTensor and its like."""


def test_all_else_goes_torchs_way(monkeypatch):
    x, w = torch.randn(3, 16, requires_grad=True), torch.ones(16)
    with torch.no_grad():
        assert not training_library.takes(x, w)
    assert training_library.takes(x, w)
    assert training_library.takes(x, None, torch.nn.Parameter(w))
    assert not training_library.takes(x.detach(), w)
    assert not training_library.takes(x.bfloat16(), w)
    assert not training_library.takes(x, w.as_subclass(Wrapped))
    assert not training_library.takes(x, w.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not training_library.takes(x, w)
    transformed = torch.func.grad(lambda x: rms_norm(x, w, 1e-5).square().sum())(x.detach())
    assert torch.equal(transformed, grad(functional.rms_norm(x, (16,), w, 1e-5).square().sum(), x)[0])
    monkeypatch.setattr(training_library, "library", lambda: None)
    assert "_RMSNorm" not in type(rms_norm(x, w, 1e-5).grad_fn).__name__
    torch.testing.assert_close(rms_norm(x, w, 1e-5), functional.rms_norm(x, (16,), w, 1e-5))


def test_where_vectors_are_narrow_torchs_own_loops_are_as_good(monkeypatch):
    monkeypatch.setenv("ARMILLARY_ISA", "portable")
    training_library.library.cache_clear()
    assert training_library.library() is None
    monkeypatch.undo()
    training_library.library.cache_clear()
