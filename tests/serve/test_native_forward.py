"""The native forward pass equals the plain decoder in every option that a family has, however the tokens are cut up."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from armillary.core.errors import ArmillaryError, InputError
from armillary.kernels import cpu_library
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig, RopeConfig
from armillary.models.decoder import Decoder
from armillary.serve.executors.forward import FlatBatch, Span
from armillary.serve.executors.native_forward import NativeForward, unsupported

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")

BASE = ModelConfig("llama", 101, 64, 96, 3, 4, 2, 16, 512)
CASES = {
    "llama": BASE,
    "biases": replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True),
    "qk norm, tied": replace(BASE, qk_norm=True, tie_embeddings=True),
    "windows": replace(BASE, windows=(20, None, 20)),
    "multi-head": replace(BASE, num_kv_heads=4),
    "multi-query": replace(BASE, num_heads=12, num_kv_heads=1, head_dim=32),
    "gemma": replace(
        BASE,
        windows=(None, 17, None),
        attention_softcap=5.0,
        logit_softcap=3.0,
        embedding_scale=8.0,
        norm_offset=1.0,
        sandwich_norms=True,
        activation="gelu_tanh",
        attention_scale=0.3,
        local_rope=RopeConfig(500.0),
        qk_norm=True,
    ),
    "odd sizes": replace(BASE, hidden_size=50, intermediate_size=70, vocab_size=53),
    "llama3 rope": replace(BASE, rope=RopeConfig(500_000.0, "llama3", 8.0, 64)),
    "yarn": replace(BASE, rope=RopeConfig(10_000.0, "yarn", 4.0, 64)),
}


def decoder_of(config: ModelConfig) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return decoder


def run(forward: NativeForward, tokens: list[int], table: list[int], chunks: tuple[int, ...]) -> torch.Tensor:
    out, at = [], 0
    for count in chunks:
        span = Span(at, count, table)
        out.append(forward.logits(FlatBatch(tokens[at : at + count], range(at, at + count), [span], range(count))).values.clone())
        at += count
    return torch.cat(out)


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("case", CASES)
def test_every_option_equals_the_plain_decoder(case: str, block_size: int) -> None:
    decoder = decoder_of(CASES[case])
    tokens = torch.randint(0, decoder.config.vocab_size, (150,))
    with torch.no_grad():
        expected = decoder(tokens, torch.arange(150), CausalAttend([150]))
    blocks = 150 // block_size + 10
    forward = NativeForward(decoder, num_blocks=blocks, block_size=block_size, threads=2)
    got = run(forward, tokens.tolist(), torch.randperm(blocks).tolist(), (1, 30, 70, 1, 48))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("quantisation", "kv_dtype"),
    [("none", torch.float32), ("fp16", torch.float16), ("int8", torch.int8), ("int4", torch.float16), ("none", torch.int8)],
)
def test_bit_equal_for_any_threads_chunks_and_company(quantisation: str, kv_dtype: torch.dtype) -> None:
    """Neither the number of threads, nor the chunking, nor other sequences in the batch change one bit of a logit."""
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (90,)).tolist()
    options = {"num_blocks": 20, "block_size": 16, "quantisation": quantisation, "kv_dtype": kv_dtype, "deterministic": True}
    results = []
    for threads, chunks in ((1, (90,)), (2, (90,)), (3, (1,) * 90), (2, (33, 57))):
        forward = NativeForward(decoder, threads=threads, **options)
        results.append(run(forward, tokens, list(range(20)), chunks))
    forward = NativeForward(decoder, threads=2, **options)
    other = torch.randint(0, 101, (37,)).tolist()
    batch = FlatBatch(other + tokens, [*range(37), *range(90)], [Span(0, 37, [9, 3, 14]), Span(0, 90, [0, 1, 2, 4, 5, 6])], range(37, 127))
    results.append(forward.logits(batch).values.clone())
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_many_rows_of_int4_are_near_what_few_are_and_equal_for_any_threads() -> None:
    """Without `deterministic` a chunk of 64 rows or more is multiplied by cpu/wide.h: the same bits from any number of threads,
    nearer to the exact products of the same levels than those are to the weights that were quantised."""
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (90,)).tolist()

    def logits(threads: int, deterministic: bool, quantisation: str = "int4") -> torch.Tensor:
        options = {"quantisation": quantisation, "deterministic": deterministic}
        forward = NativeForward(decoder, num_blocks=8, block_size=16, threads=threads, **options)
        return run(forward, tokens, list(range(8)), (90,))

    exact, wide = logits(1, True), logits(1, False)
    assert torch.equal(logits(3, False), wide)
    assert 0 < float((wide - exact).std()) < float((exact - logits(1, False, "none")).std()) / 2


@pytest.mark.parametrize("quantisation", ["none", "int4"])
def test_the_last_layer_of_rows_that_nobody_samples_is_left_out_and_changes_nothing(quantisation: str) -> None:
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (40,)).tolist()

    def logits(rows: list[int]) -> torch.Tensor:
        forward = NativeForward(decoder, num_blocks=8, block_size=16, threads=2, quantisation=quantisation, deterministic=True)
        return forward.logits(FlatBatch(tokens, range(40), [Span(0, 40, range(3))], rows)).values.clone()

    every = logits(list(range(40)))
    for rows in ([39], [0, 17, 38], [5, 5, 2], []):
        assert torch.equal(logits(rows), every[rows])


def test_a_long_context_shared_by_threads_is_bit_equal() -> None:
    """One decoding token's keys are split among threads; the parts are merged in one order, whoever finishes last."""
    decoder = decoder_of(replace(BASE, max_context=1300, windows=(None, 700, None)))
    tokens = torch.randint(0, 101, (1203,)).tolist()
    results = [
        run(NativeForward(decoder, num_blocks=80, block_size=16, threads=threads), tokens, list(range(80)), chunks)[1200:]
        for threads, chunks in ((1, (1203,)), (3, (1203,)), (3, (1200, 1, 1, 1)), (1, (1200, 1, 1, 1)))
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


def test_the_error_of_quantised_weights_follows_their_bits() -> None:
    """Root mean square error of the logits over their spread: a misplaced scale or offset would break the order at once."""
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (60,))
    with torch.no_grad():
        expected = decoder(tokens, torch.arange(60), CausalAttend([60]))
    errors = []
    for quantisation in ("fp16", "int8", "int4"):
        forward = NativeForward(decoder, num_blocks=8, block_size=16, threads=1, quantisation=quantisation)
        difference = run(forward, tokens.tolist(), list(range(8)), (60,)) - expected
        errors.append(float(difference.square().mean().sqrt() / expected.std()))
    fp16, int8, int4 = errors
    assert fp16 < 2e-3
    assert 2 * fp16 < int8 < 0.05
    assert 2 * int8 < int4 < 0.5


def test_half_precision_cache_is_close_and_half_the_size() -> None:
    decoder = decoder_of(BASE)
    tokens = torch.randint(0, 101, (60,)).tolist()
    full = NativeForward(decoder, num_blocks=8, block_size=16, threads=1)
    half = NativeForward(decoder, num_blocks=8, block_size=16, threads=1, kv_dtype=torch.float16)
    assert half.cache_bytes * 2 == full.cache_bytes
    a, b = (run(f, tokens, list(range(8)), (60,)) for f in (full, half))
    assert 0 < float((a - b).abs().max()) < 0.02


def test_an_unsupported_head_size_is_named() -> None:
    config = replace(BASE, head_dim=24)
    assert "head_dim 24" in (unsupported(config) or "")
    with pytest.raises(InputError, match="head_dim 24"):
        NativeForward(Decoder(config), num_blocks=1, block_size=16, threads=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": [5, 101]}, r"token 101 is outside 0 \.\. 100"),
        ({"tokens": [-1, 5]}, "token -1 is outside"),
        ({"rows": [2]}, "row 2 is outside"),
        ({"spans": [Span(0, 2, [4])]}, r"KV block 4 is outside 0 \.\. 3"),
        ({"spans": [Span(0, 2, [-1])]}, "KV block -1 is outside"),
        ({"spans": [Span(15, 2, [0])]}, "2 tokens from position 15 do not fit a table of 1 KV blocks of 16"),
        ({"spans": [Span(-1, 2, [0])]}, "position -1"),
        ({"spans": [Span(0, 1, [0])]}, "the sequences have 1 tokens, the batch 2"),
        ({"positions": [0]}, "2 and 1 positions"),
        ({"tokens": [], "positions": [], "spans": [Span(0, 0, [0])], "rows": []}, "0 tokens from position 0"),
    ],
)
def test_an_index_out_of_range_is_an_error_and_never_an_address(change: dict[str, Any], message: str) -> None:
    forward = NativeForward(decoder_of(BASE), num_blocks=4, block_size=16, threads=1)
    batch = FlatBatch([5, 6], [0, 1], [Span(0, 2, [3])], [1])
    forward.logits(batch)
    with pytest.raises(InputError, match=message):
        forward.logits(replace(batch, **change))


def test_two_threads_cannot_be_inside_one_step() -> None:
    forward = NativeForward(decoder_of(BASE), num_blocks=4, block_size=16, threads=1)
    batch = FlatBatch([5], [0], [Span(0, 1, [3])], [0])
    assert forward.step._busy.acquire(blocking=False)
    with pytest.raises(ArmillaryError, match="another thread"):
        forward.logits(batch)
    forward.step._busy.release()
    forward.logits(batch)


def test_the_peak_of_every_row_comes_with_it() -> None:
    decoder = decoder_of(BASE)
    forward = NativeForward(decoder, num_blocks=4, block_size=16, threads=2)
    found = forward.logits(FlatBatch(list(range(40)), range(40), [Span(0, 40, range(3))], range(40)))
    assert found.peak is not None
    assert found.best is not None
    assert torch.equal(found.peak, found.values.amax(-1))
    assert torch.equal(found.best.long(), found.values.argmax(-1))
    with torch.no_grad():
        decoder.norm.weight.fill_(3e38)  # finite, as a weight has to be; what it makes is not
    found = NativeForward(decoder, num_blocks=1, block_size=16, threads=1).logits(FlatBatch([1], [0], [Span(0, 1, [0])], [0]))
    assert found.peak is not None
    assert bool(torch.isnan(found.peak).all())


def test_released_weights_are_gone_and_the_answers_are_the_same() -> None:
    decoder = decoder_of(replace(BASE, tie_embeddings=True))
    tokens = torch.randint(0, 101, (30,)).tolist()
    kept = run(NativeForward(decoder, num_blocks=8, block_size=16, threads=1), tokens, list(range(8)), (30,))
    forward = NativeForward(decoder, num_blocks=8, block_size=16, threads=1, release=True)
    assert torch.equal(run(forward, tokens, list(range(8)), (30,)), kept)
    linears = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert linears
    assert all(linear.weight.numel() == 0 for linear in linears)
