"""Paged attention equals the plain loop, whatever the blocks, the chunks and the company."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec, CausalAttend
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span, reference_paged_attention


def _filled(
    rng: random.Random, lengths: list[int], block_size: int, kv_heads: int, head_dim: int, shuffled: bool
) -> tuple[PagedCache, list[list[int]]]:
    """A cache full of noise and a block table for each length; `shuffled` scatters the blocks."""
    needed = [-(-length // block_size) for length in lengths]
    total = sum(needed) + 3
    blocks = list(range(total))
    if shuffled:
        rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(count)] if shuffled else [blocks.pop(0) for _ in range(count)] for count in needed]
    cache = PagedCache(2, total, block_size, kv_heads, head_dim)
    for tensor in (*cache.keys, *cache.values):
        tensor.normal_()
    return cache, tables


def _copy(cache: PagedCache) -> PagedCache:
    slots, kv_heads, head_dim = cache.keys[0].shape
    other = PagedCache(len(cache.keys), slots // cache.block_size, cache.block_size, kv_heads, head_dim)
    for mine, theirs in zip((*other.keys, *other.values), (*cache.keys, *cache.values), strict=True):
        mine.copy_(theirs)
    return other


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    block_size=st.sampled_from((1, 4, 16, 64)),
    heads=st.sampled_from(((1, 1), (2, 2), (4, 1), (6, 2), (9, 3))),
    head_dim=st.sampled_from((2, 16, 64)),
    spans=st.lists(st.tuples(st.integers(0, 90), st.sampled_from((1, 1, 1, 2, 5, 17, 64))), min_size=1, max_size=7),
    window=st.sampled_from((None, None, 1, 3, 40, 500)),
    softcap=st.sampled_from((None, None, 5.0)),
    shuffled=st.booleans(),
)
def test_equals_the_plain_loop(
    seed: int,
    block_size: int,
    heads: tuple[int, int],
    head_dim: int,
    spans: list[tuple[int, int]],
    window: int | None,
    softcap: float | None,
    shuffled: bool,
) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    query_heads, kv_heads = heads
    cache, tables = _filled(rng, [start + count for start, count in spans], block_size, kv_heads, head_dim, shuffled)
    batch = [Span(start, count, table) for (start, count), table in zip(spans, tables, strict=True)]
    tokens = sum(span.count for span in batch)
    # v is a slice of a wider product in a real model: it need not be contiguous.
    q, k = torch.randn(tokens, query_heads, head_dim), torch.randn(tokens, kv_heads, head_dim)
    v = torch.randn(tokens, 2 * kv_heads, head_dim)[:, :kv_heads]
    spec = AttentionSpec(layer=1, scale=head_dim**-0.5, window=window, softcap=softcap)
    other = _copy(cache)
    with torch.inference_mode():
        ours = PagedAttend(cache, batch)(spec, q, k, v)
        plain = reference_paged_attention(spec, q, k, v, other, batch)
    torch.testing.assert_close(ours.double(), plain, atol=5e-6, rtol=0)
    for mine, theirs in zip((*cache.keys, *cache.values), (*other.keys, *other.values), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_chunks_equal_the_whole(chunk: int, window: int | None) -> None:
    length, spec = 50, AttentionSpec(layer=0, scale=0.3, window=window, softcap=None)
    torch.manual_seed(0)
    q, k, v = torch.randn(length, 6, 8), torch.randn(length, 2, 8), torch.randn(length, 2, 8)
    whole = CausalAttend([length])(spec, q, k, v)
    cache = PagedCache(1, 20, 4, 2, 8)
    table = [3, 4, 5, 19, 0, 1, 2, 9, 8, 7, 6, 17, 18]
    parts = []
    for start in range(0, length, chunk):
        piece = slice(start, min(start + chunk, length))
        parts.append(PagedAttend(cache, [Span(start, piece.stop - start, table)])(spec, q[piece], k[piece], v[piece]))
    torch.testing.assert_close(torch.cat(parts), whole, atol=2e-6, rtol=0)


def test_what_is_not_finite_stays_in_its_own_sequence() -> None:
    cache = PagedCache(1, 8, 4, 1, 4)
    spec = AttentionSpec(layer=0, scale=0.5, window=None, softcap=None)
    spans = [Span(4, 1, [0, 1]), Span(9, 1, [2, 3, 4]), Span(5, 3, [6, 7])]
    q, k, v = torch.randn(5, 2, 4), torch.randn(5, 1, 4), torch.randn(5, 1, 4)
    k[0] = v[0] = float("nan")
    cache.keys[0][0] = cache.values[0][0] = float("nan")
    out = PagedAttend(cache, spans)(spec, q, k, v)
    assert out[0].isnan().any()
    assert out[1:].isfinite().all()


def test_other_slots_are_not_touched() -> None:
    cache = PagedCache(1, 4, 4, 1, 4)
    PagedAttend(cache, [Span(2, 3, [3, 1])])(
        AttentionSpec(0, 1.0, None, None), torch.ones(3, 1, 4), torch.ones(3, 1, 4), torch.ones(3, 1, 4)
    )
    written = cache.keys[0].any(-1).any(-1).nonzero().flatten().tolist()
    assert written == [4, 14, 15]


def test_bad_tables_are_refused() -> None:
    cache = PagedCache(1, 4, 4, 1, 4)
    with pytest.raises(InputError, match="needs 2 KV blocks"):
        PagedAttend(cache, [Span(0, 5, [0])])
    with pytest.raises(InputError, match="names block 4"):
        PagedAttend(cache, [Span(0, 5, [0, 4])])
    with pytest.raises(InputError, match="at least one token"):
        PagedAttend(cache, [Span(0, 0, [0])])
