"""The native decoder step against the plain torch decoder, in every option a family has."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels import cpu_library, cpu_step
from armillary.kernels.cpu_step import CACHE_DTYPES, DecoderStep, StepCache

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")


def attention64(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None, softcap: float | None) -> Tensor:
    """The definition in float64: q [T, Hq, D], k, v [T, Hkv, D], causal."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        s = torch.tanh(s / softcap) * softcap
    at = torch.arange(q.shape[0])
    hidden = at[None] > at[:, None]
    if window:
        hidden |= at[None] <= at[:, None] - window
    return torch.einsum("hqk,khd->qhd", s.masked_fill(hidden, -torch.inf).softmax(-1), v)


@settings(max_examples=80, deadline=None)
@given(
    block=st.sampled_from([1, 4, 16, 64, 5]),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2), (9, 3), (8, 8), (7, 1), (16, 2)]),
    d=st.sampled_from([16, 64, 80, 128]),
    chunks=st.lists(st.integers(1, 130), min_size=1, max_size=4),
    window=st.sampled_from([None, 1, 7, 96, 100]),
    softcap=st.sampled_from([None, 2.0]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float8_e4m3fn]),
    seed=st.integers(0, 2**31),
)
def test_paged_attention_equals_float64(
    block: int, heads: tuple[int, int], d: int, chunks: list[int], window: int | None, softcap: float | None, dtype: torch.dtype, seed: int
) -> None:
    """Any block size, grouping, chunking, window: within 1e-5 of the definition (of what fp16 storage holds, when it is fp16)."""
    torch.manual_seed(seed)
    total, (hq, hkv) = sum(chunks), heads
    q, k, v = torch.randn(total, hq, d), torch.randn(total, hkv, d).to(dtype).float(), torch.randn(total, hkv, d).to(dtype).float()
    blocks = -(-total // block) + 3
    cache = StepCache(1, blocks, block, hkv, d, dtype)
    table = torch.randperm(blocks).int()
    out, at = [], 0
    for count in chunks:
        part = slice(at, at + count)
        out.append(cpu_step.attention(cache, q[part], k[part], v[part], at, table, scale=d**-0.5, window=window, softcap=softcap))
        at += count
    expected = attention64(q, k, v, d**-0.5, window, softcap)
    torch.testing.assert_close(torch.cat(out).double(), expected, rtol=0, atol=1e-5)


def stored_int8(x: Tensor) -> Tensor:
    """What an int8 cache holds of x [T, Hkv, D]: multiples of each row's largest magnitude / 127, in float64."""
    x = x.double()
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def off_the_ties(x: Tensor) -> Tensor:
    """x without numbers so close to half a unit that fp32 and float64 may round them to different sides."""
    units = x / (x.abs().amax(-1, keepdim=True) / 127)
    return torch.where((units - units.floor() - 0.5).abs() < 1e-3, x * (1 + 0.01 / units), x)


@settings(max_examples=60, deadline=None)
@given(
    block=st.sampled_from([1, 4, 16, 64, 5]),
    heads=st.sampled_from([(1, 1), (3, 1), (6, 2), (9, 3), (7, 1), (16, 2)]),
    d=st.sampled_from([16, 64, 80, 128]),
    chunks=st.lists(st.integers(1, 130), min_size=1, max_size=5),
    window=st.sampled_from([None, 1, 7, 96, 100]),
    softcap=st.sampled_from([None, 2.0]),
    spread=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_int8_attention_is_within_its_rounding(
    block: int, heads: tuple[int, int], d: int, chunks: list[int], window: int | None, softcap: float | None, spread: float, seed: int
) -> None:
    """The bound of `cpu/attention_int8.h`, for any block size, grouping, chunking and size of the values.

    Scores that are off by at most e change a mean of values by at most (exp(2 e) - 1) max |v|. Here e is half a unit of a
    query's largest component / 16,256 times what it meets; weights, half a unit of 1 / 32,767 for each of a chunk's 64 keys.
    Against keys and values as they were, half a unit of 1 / 127 of each row's largest adds to both.
    """
    torch.manual_seed(seed)
    total, (hq, hkv), scale = sum(chunks), heads, d**-0.5
    q, k, v = torch.randn(total, hq, d), off_the_ties(torch.randn(total, hkv, d)), off_the_ties(torch.randn(total, hkv, d) * spread)
    blocks = -(-total // block) + 3
    cache, table, out, at = StepCache(1, blocks, block, hkv, d, torch.int8), torch.randperm(blocks).int(), [], 0
    for count in chunks:
        part = slice(at, at + count)
        out.append(cpu_step.attention(cache, q[part], k[part], v[part], at, table, scale=scale, window=window, softcap=softcap))
        at += count
    got, most = torch.cat(out).double(), float(v.abs().max())
    in_scores = scale * float(q.abs().max()) / (2 * 16256) * float(k.abs().sum(-1).max()) * 1.01
    in_mean = float(np.expm1(2 * in_scores)) + 64 / (2 * 32767) + 1e-5
    expected = attention64(q, stored_int8(k), stored_int8(v), scale, window, softcap)
    assert float((got - expected).abs().max()) <= most * in_mean
    in_scores += scale * float(k.abs().max()) / 254 * float(q.abs().sum(-1).max())
    in_mean = float(np.expm1(2 * in_scores)) + 64 / (2 * 32767) + 1e-5 + 1 / 254
    assert float((got - attention64(q, k, v, scale, window, softcap)).abs().max()) <= most * in_mean


def test_int8_holds_what_it_can_represent_exactly() -> None:
    """Whole numbers up to 127 times a power of two: the cache adds nothing to the arithmetic's 2^-15, one key nothing at all."""
    torch.manual_seed(0)
    k, v = (torch.randint(-127, 128, (200, 2, 64)).float() / 64 for _ in range(2))
    k[..., 5] = v[..., 9] = 127 / 64
    q = torch.randn(200, 6, 64)
    cache = StepCache(1, 13, 16, 2, 64, torch.int8)
    out = cpu_step.attention(cache, q, k, v, 0, torch.randperm(13).int(), scale=0.125)
    torch.testing.assert_close(out[0], v[0].repeat_interleave(3, 0), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.double(), attention64(q, k, v, 0.125, None, None), rtol=0, atol=1e-3)
    fp16 = StepCache(1, 13, 16, 2, 64, torch.float16)
    assert cache.nbytes * 128 == fp16.nbytes * 68  # 64 bytes and a scale instead of 128


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (600, 3.0), (40, None)])
def test_long_contexts_are_merged_from_segments(window: int | None, softcap: float | None) -> None:
    """More positions than a softmax runs over without a new start (kSegment of cpu/attention.h)."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1100, 2, 32) * 3, torch.randn(1100, 1, 32), torch.randn(1100, 1, 32)
    out = cpu_step.attention(StepCache(1, 70, 16, 1, 32), q, k, v, 0, torch.randperm(70).int(), scale=0.2, window=window, softcap=softcap)
    torch.testing.assert_close(out.double(), attention64(q, k, v, 0.2, window, softcap), rtol=0, atol=1e-5)


@settings(max_examples=8, deadline=None)
@given(
    block=st.sampled_from([5, 16, 64]),
    heads=st.sampled_from([(9, 3), (4, 4), (7, 1), (16, 2)]),
    cuts=st.lists(st.integers(1, 699), min_size=1, max_size=6, unique=True),
    window=st.sampled_from([None, 100, 600]),
    dtype=st.sampled_from(CACHE_DTYPES),
)
def test_a_query_does_not_depend_on_its_chunk(
    block: int, heads: tuple[int, int], cuts: list[int], window: int | None, dtype: torch.dtype
) -> None:
    """Bit for bit: the sums run in one order whether a token is computed alone or in a chunk."""
    torch.manual_seed(0)
    total, (hq, hkv), blocks = 700, heads, -(-700 // block)
    q, k, v = torch.randn(total, hq, 64), torch.randn(total, hkv, 64), torch.randn(total, hkv, 64)
    ends = sorted(cuts)
    results = []
    for chunks in ([total], [1] * total, [end - start for start, end in zip([0, *ends], [*ends, total], strict=True)]):
        cache, at, out = StepCache(1, blocks, block, hkv, 64, dtype), 0, []
        for count in chunks:
            part = slice(at, at + count)
            out.append(cpu_step.attention(cache, q[part], k[part], v[part], at, torch.arange(blocks).int(), scale=0.125, window=window))
            at += count
        results.append(torch.cat(out))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("dtype", CACHE_DTYPES)
def test_nan_is_not_hidden(dtype: torch.dtype) -> None:
    """Every query that sees a key that is not a number says so; queries long before it do not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(100, 1, 16), torch.randn(100, 1, 16), torch.randn(100, 1, 16)
    k[70, 0, 3] = torch.nan
    out = cpu_step.attention(StepCache(1, 7, 16, 1, 16, dtype), q, k, v, 0, torch.arange(7).int(), scale=0.25)
    assert bool(out[:64].isfinite().all())
    assert bool(out[70:].isnan().any(-1).all())


def test_fp8_is_torchs_and_saturates() -> None:
    """Every code is read as torch reads it, and numbers are stored as torch rounds them; beyond 448 there is no infinity to store."""
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    numbers = torch.cat(
        (codes, codes * 1.03, codes * 0.5, torch.randn(1024) * 30, torch.randn(256) * 1e-3, torch.tensor([1e9, -1e9]), torch.zeros(254))
    )
    rows = numbers.view(-1, 1, 16)
    cache = StepCache(1, len(rows) // 16 + 1, 16, 1, 16, torch.float8_e4m3fn)
    cpu_step.attention(cache, torch.zeros_like(rows), rows, rows, 0, torch.arange(cache.blocks).int(), scale=1.0)
    stored = cache.values[0].float()[: numbers.numel()]
    expected = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).float()
    torch.testing.assert_close(stored, expected, rtol=0, atol=0, equal_nan=True)
    keys = cache.keys[0].float().view(-1, 16, 16).mT.reshape(-1)[: numbers.numel()]
    torch.testing.assert_close(keys, expected, rtol=0, atol=0, equal_nan=True)


def test_cache_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InputError, match="float32, float16, int8 or float8_e4m3fn"):
        StepCache(1, 4, 16, 1, 16, torch.bfloat16)


def test_head_dim_must_be_whole_vectors() -> None:
    class Shape:
        head_dim = 24

    with pytest.raises(InputError, match="head_dim is 24"):
        DecoderStep(Shape(), StepCache(1, 1, 16, 1, 16), 1)  # type: ignore[arg-type]


def test_more_threads_than_the_system_gives_is_an_error() -> None:
    """In a process whose stacks may not be had: the threads that did start are joined, and the caller is told."""
    program = (
        "import resource, sys\n"
        "from armillary.kernels import cpu_library\n"
        "lib = cpu_library.library()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "sys.exit(0 if lib.arm_engine_create(20_000) is None else 1)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], timeout=120, check=False).returncode == 0
