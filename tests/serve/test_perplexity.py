"""Perplexity is exp of the mean loss of every token that something predicts, whoever computes it and however it is cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VOCABULARY, logits_of, tiny

from armillary.core.errors import ArmillaryError, InputError
from armillary.kernels import cpu_library
from armillary.serve.executors.native_forward import NativeForward
from armillary.serve.executors.torch_forward import TorchForward
from armillary.serve.perplexity import Scores, score, windows

BLOCK = 16


def blocks(context: int) -> int:
    return -(-context // BLOCK)


@given(count=st.integers(4, 200), context=st.integers(4, 50), bos=st.none() | st.just(96))
def test_windows_hold_every_token_once_in_order_up_to_the_last_whole_window(count: int, context: int, bos: int | None) -> None:
    tokens = [i % 90 for i in range(count)]
    if count < context:
        with pytest.raises(InputError, match="less than one window"):
            windows(tokens, context, bos)
        return
    cut = windows(tokens, context, bos)
    assert len(cut) == count // context
    joined = [token for window in cut for token in window]
    expected = tokens[: len(joined)]
    if bos is not None:
        expected = [bos if i % context == 0 else token for i, token in enumerate(expected)]
    assert joined == expected


def test_a_window_too_short_for_two_halves_is_refused() -> None:
    with pytest.raises(InputError, match="too short to score"):
        windows([1, 2, 3, 4, 5], 3)


def exact(decoder, cut):  # type: ignore[no-untyped-def]
    """-ln p by the plain decoder in float64, a window at a time."""
    decoder = decoder.double()
    losses = []
    for window in cut:
        logprobs = torch.log_softmax(logits_of(decoder, window), -1)
        losses.append([-logprobs[i, token].item() for i, token in enumerate(window[1:])])
    decoder.float()
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("context", [21, 256])
def test_both_backends_give_the_losses_of_the_plain_decoder(native: bool, context: int) -> None:
    if native and not cpu_library.available():
        pytest.skip("the native kernels need g++")
    decoder = tiny("qwen3", max_context=512)
    torch.manual_seed(1)
    cut = windows(torch.randint(0, VOCABULARY, (3 * context,)).tolist(), context)
    expected = exact(decoder, cut)
    if native:
        forward = NativeForward(decoder, num_blocks=blocks(context), block_size=BLOCK, threads=1)
    else:
        forward = TorchForward(decoder, num_blocks=blocks(context), block_size=BLOCK)
    seen = []
    scores = score(forward, cut, BLOCK, lambda done, total: seen.append((done, total)))
    torch.testing.assert_close(scores.losses, expected, rtol=0, atol=2e-4)
    assert scores.perplexity == pytest.approx(math.exp(expected.mean()), rel=1e-5)
    assert scores.second_half == pytest.approx(math.exp(expected[:, context // 2 :].mean()), rel=1e-5)  # predicts context/2 + 1 ...
    assert seen[-1] == (3 * context, 3 * context)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    decoder = tiny()
    with torch.no_grad():
        decoder.lm_head.weight.zero_()
    forward = TorchForward(decoder, num_blocks=blocks(64), block_size=BLOCK)
    scores = score(forward, windows(list(range(64)) * 2, 64), BLOCK)
    assert scores.perplexity == pytest.approx(VOCABULARY, rel=1e-5)
    assert scores.error == pytest.approx(0.0, abs=1e-4)


def test_a_model_with_nan_is_refused() -> None:
    decoder = tiny()
    with torch.no_grad():
        decoder.norm.weight[0] = float("nan")
    with pytest.raises(ArmillaryError, match="not numbers"):
        score(TorchForward(decoder, num_blocks=2, block_size=BLOCK), windows(list(range(32)), 16), BLOCK)


def test_the_excess_over_a_base_is_the_ratio_of_perplexities_with_the_error_of_the_paired_differences() -> None:
    torch.manual_seed(0)
    base = Scores(torch.rand(8, 100, dtype=torch.float64) * 5)
    worse = Scores(base.losses + 0.02)
    share, error = worse.excess(base)
    assert share == pytest.approx(worse.perplexity / base.perplexity - 1)
    assert share == pytest.approx(math.exp(0.02) - 1)
    assert error == pytest.approx(0.0, abs=1e-12)
    noisy = Scores(base.losses + torch.randn(8, 1, dtype=torch.float64) * 0.01)
    means = (noisy.losses - base.losses).mean(1)
    assert noisy.excess(base)[1] == pytest.approx(math.exp(means.mean()) * means.std().item() / math.sqrt(8))
    assert Scores(base.losses[:1]).error is None
