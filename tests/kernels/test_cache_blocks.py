"""Blocks leave a pool as bytes and come back the same, whatever the layout; and what a sequence reads is what was carried."""

import pytest
import torch

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.cpu_step import CACHE_DTYPES, StepCache, attention
from armillary.kernels.paged_attention import PagedCache

HEADS, DIM = 2, 32
native = pytest.mark.skipif(not cpu_library.available(), reason="the native kernels are not built; the torch cache runs the same laws")


def filled(cache):
    for tensor in (cache.keys, cache.values, getattr(cache, "key_scales", None), getattr(cache, "value_scales", None)):
        for layer in tensor if tensor is not None else ():
            layer.view(torch.uint8).random_(0, 120)
    return cache


def pools():
    yield "torch", lambda size: PagedCache(2, 12, size, HEADS, DIM)
    for dtype in CACHE_DTYPES:
        yield f"native {dtype}", lambda size, dtype=dtype: StepCache(2, 12, size, HEADS, DIM, dtype)


@pytest.mark.parametrize("block_size", [1, 4, 5, 16, 24, 32])
@pytest.mark.parametrize(("name", "make"), list(pools()))
def test_blocks_are_copied_and_carried_whole_and_alone(name, make, block_size):
    here, there = filled(make(block_size)).contents, filled(make(block_size)).contents
    before = here.read(range(12))
    assert before.shape[0] == 12
    here.copy([(3, 7), (0, 11)])
    after = here.read(range(12))
    assert torch.equal(after[[7, 11]], before[[3, 0]])
    rest = [0, 1, 2, 3, 4, 5, 6, 8, 9, 10]
    assert torch.equal(after[rest], before[rest])
    untouched = there.read(range(12))
    there.write([5, 2], here.read([7, 4]))
    assert torch.equal(there.read([5, 2]), here.read([7, 4]))
    assert torch.equal(there.read([0, 1, 3, 4, 6, 11]), untouched[[0, 1, 3, 4, 6, 11]])
    assert here.read([]).shape[0] == 0


def test_what_cannot_be_is_refused():
    contents = filled(PagedCache(1, 4, 8, HEADS, DIM)).contents
    with pytest.raises(InputError, match=r"KV block 4 is outside 0 \.\. 3"):
        contents.read([1, 4])
    with pytest.raises(InputError, match="copied onto one that is itself copied"):
        contents.copy([(0, 1), (1, 2)])
    with pytest.raises(InputError, match=r"2 KV blocks of this pool are 2 x 4,096 bytes, the data is \[1, 4096\]"):
        contents.write([0, 1], contents.read([2]))
    with pytest.raises(InputError, match="4,096 bytes"):
        contents.write([0], contents.read([2]).view(torch.int8))


@native
@pytest.mark.parametrize("dtype", CACHE_DTYPES)
@pytest.mark.parametrize("block_size", [4, 5, 16])
def test_a_sequence_goes_on_in_another_pool_with_the_same_bits(dtype, block_size):
    generator = torch.Generator().manual_seed(block_size)
    q, k, v = (torch.randn(23, heads, DIM, generator=generator) for heads in (4, HEADS, HEADS))
    whole, here, there = (StepCache(1, 12, block_size, HEADS, DIM, dtype) for _ in range(3))
    table, moved = torch.tensor([9, 2, 7, 0, 4, 11], dtype=torch.int32), torch.tensor([3, 8, 1, 10, 5, 6], dtype=torch.int32)
    wanted = attention(whole, q, k, v, 0, table, scale=0.2)
    attention(here, q[:14], k[:14], v[:14], 0, table, scale=0.2)
    blocks = -(-14 // block_size)
    there.contents.write(moved[:blocks].tolist(), here.contents.read(table[:blocks].tolist()))
    assert torch.equal(attention(there, q[14:], k[14:], v[14:], 14, moved, scale=0.2), wanted[14:])
