"""Run by test_interpreter.py under TRITON_INTERPRET=1: the Triton kernel equals the plain loop, whatever its tiles."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.gpu.paged_attention import GpuPagedAttend
from armillary.kernels.paged_attention import PagedCache, Span, reference_paged_attention

PLAIN = AttentionSpec(layer=0, scale=0.25)
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}  # of weights and outputs, where values are about 1


def problem(
    seed: int, spans: list[tuple[int, int]], block_size: int, heads: tuple[int, int], head_dim: int, dtype: torch.dtype
) -> tuple[PagedCache, list[Span], Tensor, Tensor, Tensor]:
    """A cache full of noise with scattered blocks, the spans, and q, k, v for them."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    needed = [-(-(start + count) // block_size) for start, count in spans]
    blocks = list(range(sum(needed) + 2))
    rng.shuffle(blocks)
    cache = PagedCache(1, len(blocks), block_size, heads[1], head_dim, dtype)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    batch = [Span(start, count, [blocks.pop() for _ in range(n)]) for (start, count), n in zip(spans, needed, strict=True)]
    tokens = sum(count for _, count in spans)
    q, k, v = (torch.randn(tokens, h, head_dim).to(dtype) for h in (heads[0], heads[1], heads[1]))
    return cache, batch, q, k, v


@settings(max_examples=25)
@given(
    seed=st.integers(0, 1 << 30),
    block_size=st.sampled_from((1, 3, 16, 64)),
    heads=st.sampled_from(((1, 1), (2, 2), (6, 2), (9, 3), (17, 1))),
    head_dim=st.sampled_from((1, 16, 24, 64)),
    spans=st.lists(st.tuples(st.integers(0, 150), st.sampled_from((1, 1, 2, 5, 20))), min_size=1, max_size=3),
    window=st.sampled_from((None, None, 1, 3, 40, 500)),
    softcap=st.sampled_from((None, None, 5.0)),
    dtype=st.sampled_from((torch.float32, torch.float16, torch.bfloat16)),
    splits=st.sampled_from((None, 1, 2, 5)),
)
def test_equals_the_plain_loop(
    seed: int,
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    spans: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    dtype: torch.dtype,
    splits: int | None,
) -> None:
    cache, batch, q, k, v = problem(seed, spans, block_size, heads, head_dim, dtype)
    spec = AttentionSpec(0, head_dim**-0.5, window, softcap)
    ours = GpuPagedAttend(cache, batch, splits)(spec, q, k, v)
    assert ours.dtype == dtype
    written = [tensor.clone() for tensor in (*cache.keys, *cache.values)]
    plain = reference_paged_attention(spec, q, k, v, cache, batch)  # writes the same keys and values once more
    assert all(torch.equal(a, b) for a, b in zip(written, (*cache.keys, *cache.values), strict=True))
    largest = max(1.0, float(cache.values[0].abs().max()))
    torch.testing.assert_close(ours.double(), plain, atol=ROUNDING[dtype] * largest, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_narrow_cache_is_widened_exactly_for_fp32_queries(dtype: torch.dtype) -> None:
    cache, batch, q, k, v = problem(1, [(70, 1), (3, 9)], 16, (4, 2), 32, dtype)
    ours = GpuPagedAttend(cache, batch, 2)(PLAIN, q.float(), k, v)
    torch.testing.assert_close(ours.double(), reference_paged_attention(PLAIN, q.float(), k, v, cache, batch), atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # meant: see the kernel
@pytest.mark.parametrize(("magnitude", "tolerance"), [(1e-30, 1e-5), (300.0, 3e-3)])  # scores of 1e3 carry 1e-4 of rounding in fp32
def test_scores_of_any_size_neither_overflow_nor_vanish(magnitude: float, tolerance: float) -> None:
    cache, batch, q, k, v = problem(2, [(90, 1), (0, 20)], 8, (2, 1), 16, torch.float32)
    cache.keys[0].mul_(magnitude)
    for softcap in (None, 30.0):
        spec = AttentionSpec(0, 1.0, None, softcap)
        ours = GpuPagedAttend(cache, batch, 3)(spec, q, k * magnitude, v)
        plain = reference_paged_attention(spec, q, k * magnitude, v, cache, batch)
        torch.testing.assert_close(ours.double(), plain, atol=tolerance, rtol=0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, of the interpreter
def test_what_is_not_finite_stays_in_its_own_sequence() -> None:
    cache, batch, q, k, v = problem(3, [(4, 1), (9, 1), (5, 3)], 4, (2, 1), 16, torch.float32)
    k[0] = v[0] = float("nan")
    for block in set(range(cache.num_blocks)) - {block for span in batch for block in span.blocks}:
        cache.keys[0][block * 4 : block * 4 + 4] = float("nan")
        cache.values[0][block * 4 : block * 4 + 4] = float("inf")
    out = GpuPagedAttend(cache, batch, 2)(PLAIN, q, k, v)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_q_may_be_a_slice_of_a_wider_product_and_the_batch_empty() -> None:
    cache, batch, q, k, v = problem(4, [(17, 1), (0, 4)], 4, (4, 2), 16, torch.float32)
    wide = torch.cat((q, torch.randn(5, 3, 16)), 1)[:, :4]
    attend = GpuPagedAttend(cache, batch)
    assert torch.equal(attend(PLAIN, wide, k, v), attend(PLAIN, q, k, v))
    assert GpuPagedAttend(cache, [])(PLAIN, q[:0], k[:0], v[:0]).shape == (0, 4, 16)


def test_bad_input_is_refused_by_name() -> None:
    cache, batch, q, k, v = problem(5, [(4, 1)], 4, (4, 2), 16, torch.float16)
    attend = GpuPagedAttend(cache, batch)
    with pytest.raises(InputError, match="needs 2 KV blocks"):
        GpuPagedAttend(cache, [Span(0, 5, [0])])
    with pytest.raises(InputError, match="splits is 0"):
        GpuPagedAttend(cache, batch, 0)
    with pytest.raises(InputError, match="head_dim is 512"):
        GpuPagedAttend(PagedCache(1, 1, 4, 1, 512), [])
    with pytest.raises(InputError, match=r"the cache holds torch\.int8"):
        GpuPagedAttend(PagedCache(1, 1, 4, 1, 16, torch.int8), [])
    with pytest.raises(InputError, match="multiple of 2"):
        attend(PLAIN, q[:, :3], k, v)
    with pytest.raises(InputError, match=r"torch\.bfloat16 and the cache torch\.float16"):
        attend(PLAIN, q.bfloat16(), k, v)
    with pytest.raises(InputError, match="the cache takes"):
        attend(PLAIN, q, k[:, :1], v)
    with pytest.raises(InputError, match="the window is 0"):
        attend(AttentionSpec(0, 1.0, window=0), q, k, v)
    with pytest.raises(InputError, match="the softcap is -1"):
        attend(AttentionSpec(0, 1.0, softcap=-1.0), q, k, v)
