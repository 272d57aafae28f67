"""The native decoder step against the plain torch decoder, in every option a family has."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels import cpu_library, cpu_step
from armillary.kernels.cpu_step import DecoderStep, StepCache

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
    dtype=st.sampled_from([torch.float32, torch.float16]),
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
    dtype=st.sampled_from([torch.float32, torch.float16]),
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


def test_nan_is_not_hidden() -> None:
    """Every query that sees a key that is not a number says so; queries long before it do not."""
    torch.manual_seed(0)
    q, k, v = torch.randn(100, 1, 16), torch.randn(100, 1, 16), torch.randn(100, 1, 16)
    k[70, 0, 3] = torch.nan
    out = cpu_step.attention(StepCache(1, 7, 16, 1, 16), q, k, v, 0, torch.arange(7).int(), scale=0.25)
    assert bool(out[:64].isfinite().all())
    assert bool(out[70:].isnan().any(-1).all())


def test_cache_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(InputError, match="float32 or float16"):
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
