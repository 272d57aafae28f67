"""Queries that read the best pages only (Quest): the bound is one, all pages are everything, and what matters is found."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels import cpu_library, cpu_step
from armillary.kernels.cpu_step import CACHE_DTYPES, StepCache
from armillary.kernels.seen import PAGE, Seen

pytestmark = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")


def stored(cache: StepCache) -> Tensor:
    """The keys that a cache holds, [tiles, kv heads, 16, head_dim], in float32."""
    heads, d = cache.kv_heads, cache.head_dim
    if cache.dtype == torch.int8:
        assert cache.key_scales is not None
        biased = cache.keys[0].view(torch.uint8).view(-1, heads, d // 4, PAGE, 4).float() - 128
        return biased.permute(0, 1, 3, 2, 4).reshape(-1, heads, PAGE, d) * cache.key_scales[0].view(-1, heads, PAGE, 1)
    return cache.keys[0].view(-1, heads, d, PAGE).float().mT


def bounds(cache: StepCache) -> Tensor:
    """[tiles, kv heads, 2, head_dim]: of the keys, and of their negatives. Exact: a scale has 8 significant bits."""
    assert cache.bounds is not None
    return cache.bounds[0].view(cache.kv_heads, -1, 2, cache.head_dim).transpose(0, 1).float() * scales(cache)


def scales(cache: StepCache) -> Tensor:
    """[tiles, kv heads, 1, 1]"""
    assert cache.bound_scales is not None
    return cache.bound_scales[0].view(cache.kv_heads, -1, 1, 1).transpose(0, 1)


def filled(total: int, chunks: list[int], block: int, heads: int, d: int, dtype: torch.dtype, keys: Tensor) -> tuple[StepCache, Tensor]:
    """A cache of noise into whose scattered blocks `keys` [total, heads, d] were written chunk by chunk; and the block table."""
    blocks = -(-total // block) + 2
    cache = StepCache(1, blocks, block, heads, d, dtype, bounds=True)
    assert cache.bounds is not None
    assert cache.bound_scales is not None
    cache.bounds.fill_(-7)  # of somebody before
    cache.bound_scales.fill_(-7.0)
    table, at = torch.randperm(blocks).int(), 0
    for count in chunks:
        part = slice(at, at + count)
        cpu_step.attention(cache, torch.randn(count, heads, d), keys[part], keys[part], at, table, scale=1.0)
        at += count
    return cache, table


@settings(max_examples=40, deadline=None)
@given(
    block=st.sampled_from([16, 48, 64]),
    d=st.sampled_from([16, 64, 80]),
    chunks=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    dtype=st.sampled_from(CACHE_DTYPES),
    spread=st.sampled_from([1e-6, 1.0, 1e3]),
    seed=st.integers(0, 2**31),
)
def test_bounds_are_those_of_the_stored_keys_and_bound_every_score(
    block: int, d: int, chunks: list[int], dtype: torch.dtype, spread: float, seed: int
) -> None:
    """However the keys came: each bound is the exact largest, rounded upwards to a byte, so no q . k exceeds its page's."""
    torch.manual_seed(seed)
    total = sum(chunks)
    cache, table = filled(total, chunks, block, 2, d, dtype, torch.randn(total, 2, d) * spread)
    keys, found = stored(cache), bounds(cache)
    for page in range(-(-total // PAGE)):
        tile = int(table[page * PAGE // block]) * (block // PAGE) + page * PAGE % block // PAGE
        written = keys[tile, :, : min(PAGE, total - page * PAGE)]
        largest = torch.stack((written.amax(1), (-written).amax(1)), 1)  # [heads, 2, d]
        assert bool((found[tile].float() >= largest).all())
        scale = scales(cache)[tile]  # [heads, 1, 1]
        assert bool((found[tile] - scale < largest).all()), "no smaller byte would do"
        most = largest.abs().amax((1, 2))
        assert bool((scale.flatten() <= most / 127 * (1 + 2**-7) + 2**-120).all())
        assert bool((scale.flatten() * 127 >= most).all())
        q = torch.randn(50, 2, d).double()
        above, beneath = found[tile, :, 0].double(), found[tile, :, 1].double()
        bound = (q.clamp(min=0) * above + (-q).clamp(min=0) * beneath).sum(-1)  # [50, heads]
        bound += 1e-12 * (q.abs() * largest.double().abs().amax(1)).sum(-1)  # float64 adds in another order
        assert bool((torch.einsum("nhd,hkd->nhk", q, written.double()).amax(-1) <= bound).all())


@settings(max_examples=30, deadline=None)
@given(
    block=st.sampled_from([16, 64]),
    heads=st.sampled_from([(1, 1), (6, 2), (9, 3), (40, 2)]),
    total=st.integers(1, 400),
    dtype=st.sampled_from(CACHE_DTYPES),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_a_budget_of_all_pages_is_bit_equal_to_dense(
    block: int, heads: tuple[int, int], total: int, dtype: torch.dtype, softcap: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    hq, hkv = heads
    q, k, v = torch.randn(total, hq, 32), torch.randn(total, hkv, 32), torch.randn(total, hkv, 32)
    results = []
    for pages in (0, -(-total // PAGE), 1000):
        cache = StepCache(1, -(-total // block), block, hkv, 32, dtype, bounds=True)
        table = torch.arange(cache.blocks - 1, -1, -1).int()
        results.append(cpu_step.attention(cache, q, k, v, 0, table, scale=0.2, softcap=softcap, seen=Seen(pages)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@settings(max_examples=25, deadline=None)
@given(
    heads=st.sampled_from([(2, 2), (6, 2), (9, 3)]),
    total=st.integers(100, 500),
    pages=st.integers(1, 8),
    always=st.sampled_from([(0, 1), (1, 2), (0, 3), (3, 1)]),
    scale=st.sampled_from([0.125, -0.2]),
    seed=st.integers(0, 2**31),
)
def test_it_reads_the_best_pages_and_nothing_else(
    heads: tuple[int, int], total: int, pages: int, always: tuple[int, int], scale: float, seed: int
) -> None:
    """The first, the last, and those with the highest bound over the heads of a group; attention is that over these alone.

    A query is rounded to 15 bits of its largest component before pages are compared: within that bounds are equal.
    """
    first, last = always if sum(always) <= pages else (0, 1)
    torch.manual_seed(seed)
    (hq, hkv), d = heads, 32
    q, k, v = torch.randn(total, hq, d), torch.randn(total, hkv, d), torch.randn(total, hkv, d)
    cache, table = filled(total - 1, [total - 1], 16, hkv, d, torch.float32, k[:-1])
    values = StepCache(1, cache.blocks, 16, hkv, d, bounds=True)
    cpu_step.attention(values, q[:-1], k[:-1], v[:-1], 0, table, scale=scale)
    read = torch.full((1, hkv, pages), -1, dtype=torch.int32)
    got = cpu_step.attention(values, q[-1:], k[-1:], v[-1:], total - 1, table, scale=scale, seen=Seen(pages, first, last), read=read)[0]
    count = -(-total // PAGE)
    by_page = bounds(values)[table[:count].long()].double()  # [pages, kv heads, 2, d]
    scaled = q[-1].double().view(hkv, hq // hkv, d) * scale
    score = torch.einsum("hgd,phd->phg", scaled.clamp(min=0), by_page[:, :, 0])
    score = (score + torch.einsum("hgd,phd->phg", (-scaled).clamp(min=0), by_page[:, :, 1])).amax(-1)
    for head in range(hkv):
        tiles = [int(tile) for tile in read[0, head] if tile >= 0]
        chosen = [table.tolist().index(tile) for tile in tiles]
        assert chosen == sorted(set(chosen))
        assert len(chosen) == min(pages, count)
        fixed = {page for page in range(count) if page < first or page >= count - last}
        assert fixed <= set(chosen) or pages >= count
        free, left = set(chosen) - fixed, set(range(count)) - set(chosen)
        slack = 2**-16 * float((scaled[head].abs().amax(-1) * by_page[:, head].abs().amax(1).sum(-1).amax()).amax())
        assert not free or not left or float(score[sorted(free), head].min()) >= float(score[sorted(left), head].max()) - 2 * slack
        seen = [p for page in chosen for p in range(page * PAGE, min((page + 1) * PAGE, total))]
        weights = (k[seen, head].double() @ scaled[head].T).softmax(0)  # [seen, group]
        expected = weights.T @ v[seen, head].double()
        torch.testing.assert_close(got[head * (hq // hkv) : (head + 1) * (hq // hkv)].double(), expected, rtol=0, atol=1e-5)


def test_a_needle_is_found_at_every_depth() -> None:
    """8,192 keys, a budget of 256: one key that one head of a group asks for is read wherever it lies, and answers."""
    torch.manual_seed(0)
    total, d, pages = 8192, 64, 256 // PAGE
    k, v = torch.randn(total, 1, d), torch.randn(total, 1, d)
    cache = StepCache(1, total // PAGE, PAGE, 1, d, bounds=True)
    table = torch.randperm(cache.blocks).int()
    needle = torch.randn(d) * 2
    q = torch.randn(1, 3, d)
    q[0, 1] = needle * 2
    for depth in range(5, total - 1, 409):
        keys = k.clone()
        keys[depth] = needle
        # All but the last key by way of the pool itself: a forward pass over 8,192 queries would say nothing more.
        cache.keys[0].view(-1, d, PAGE)[table.long()] = keys.view(-1, PAGE, d).mT
        cache.values[0].view(-1, PAGE, d)[table.long()] = v.view(-1, PAGE, d)
        cache.bound_pages(0, 0, total)
        read = torch.empty(1, 1, pages, dtype=torch.int32)
        out = cpu_step.attention(cache, q, keys[-1:], v[-1:], total - 1, table, scale=d**-0.5, seen=Seen(pages), read=read)
        assert int(table[depth // PAGE]) in read[0, 0].tolist()
        torch.testing.assert_close(out[0, 1], v[depth, 0], rtol=0, atol=0.05)


def test_a_key_that_is_no_number_is_always_read() -> None:
    torch.manual_seed(0)
    k = torch.randn(640, 1, 16)
    k[37, 0, 3] = torch.nan
    cache, table = filled(639, [639], 16, 1, 16, torch.float32, k[:-1])
    out = cpu_step.attention(cache, torch.randn(1, 2, 16), k[-1:], k[-1:], 639, table, scale=0.25, seen=Seen(2))
    assert bool(out.isnan().all())


def test_blocks_that_are_not_whole_pages_are_refused() -> None:
    with pytest.raises(InputError, match="20 tokens is not whole pages of 16"):
        StepCache(1, 4, 20, 1, 16, bounds=True)
