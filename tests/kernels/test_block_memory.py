"""Block memory (InfLLM): a passkey is found at every depth, what is far stands at one distance, and little is read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.block_memory import BlockMemory
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span
from armillary.kernels.seen import UNIT, Seen

SPEC = AttentionSpec(0, 0.25)
D = 32


def still(spec: AttentionSpec) -> Tensor:
    return torch.zeros(D // 2)


def turning(spec: AttentionSpec) -> Tensor:
    return 1.0 / 100 ** (torch.arange(0, D, 2) / D)


def turned(x: Tensor, positions: Tensor) -> Tensor:
    angles = positions.double()[:, None, None] * turning(SPEC).double()
    a, b = x.double().chunk(2, -1)
    return torch.cat((a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()), -1)


def memory_of(length: int, seen: Seen, units: int, frequencies: object = still, heads: int = 1) -> tuple[BlockMemory, list[int]]:
    cache = PagedCache(1, -(-length // 16) + 2, 16, heads, D)
    return BlockMemory(cache, seen, units, frequencies), torch.randperm(cache.num_blocks).tolist()  # type: ignore[arg-type]


@pytest.mark.parametrize("depth", [200, 1111, 2900, 3700])
def test_a_passkey_is_found_at_every_depth(depth: int) -> None:
    """Of 4,097 tokens 128 are the window and two units of 128 are looked up: the key that the text around it attended to answers."""
    torch.manual_seed(0)
    length = 4096
    q, k, v = torch.randn(length + 1, 2, D), torch.randn(length + 1, 1, D), torch.randn(length + 1, 1, D)
    passkey = torch.randn(D) * 2
    k[depth, 0] = passkey
    q[depth + 1 : depth + 6] = passkey  # what comes right after a fact attends to it
    q[length, 1] = passkey * 2
    memory, table = memory_of(length + 1, Seen(sinks=4, rolling=128), 2)
    for start, count in ((0, 1000), (1000, length - 1000), (length, 1)):
        part = slice(start, start + count)
        before = memory.reads.read, memory.reads.dense
        out = memory.attend([Span(start, count, table)])(SPEC, q[part], k[part], v[part])
    torch.testing.assert_close(out[0, 1], v[depth, 0], rtol=0, atol=0.05)
    read, dense = memory.reads.read - before[0], memory.reads.dense - before[1]
    assert dense == (length + 1) * 2 * D * 4
    assert read <= (UNIT + 2 * UNIT + 2 * UNIT) * 2 * D * 4  # the unit that the sinks begin, two looked up, window and less than a unit


def test_what_is_far_stands_where_the_window_ends() -> None:
    """By the definition, in float64: first tokens and looked-up units at the window's distance, the window at its own."""
    torch.manual_seed(0)
    length, seen = 700, Seen(sinks=3, rolling=130)
    raw_q, raw_k, v = torch.randn(length, 2, D), torch.randn(length, 2, D), torch.randn(length, 2, D)
    at = torch.arange(length)
    q, k = turned(raw_q, at).float(), turned(raw_k, at).float()
    memory, table = memory_of(length, seen, 99, turning, heads=2)  # every unit
    out = memory.attend([Span(0, length, table)])(SPEC, q, k, v)
    for position in (127, 300, 511, 699):
        local = seen.first(position // UNIT * UNIT, UNIT)
        distances = torch.where(at[: position + 1] < local, 130, position - at[: position + 1])
        keys = turned(raw_k[: position + 1], -distances)
        for head in range(2):
            weights = (keys[:, head] @ raw_q[position, head].double() * SPEC.scale).softmax(0)
            torch.testing.assert_close(out[position, head].double(), weights @ v[: position + 1, head].double(), rtol=0, atol=1e-4)


def test_a_window_that_holds_everything_is_bit_equal_to_paged_attention() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(400, 2, D), torch.randn(400, 1, D), torch.randn(400, 1, D)
    memory, table = memory_of(400, Seen(sinks=4, rolling=396), 2)
    other = PagedCache(1, memory.cache.num_blocks, 16, 1, D)
    for start, count in ((0, 250), (250, 1), (251, 149)):
        part, spans = slice(start, start + count), [Span(start, count, table)]
        assert torch.equal(
            memory.attend(spans)(SPEC, q[part], k[part], v[part]), PagedAttend(other, spans)(SPEC, q[part], k[part], v[part])
        )


def test_blocks_that_do_not_fill_a_unit_are_refused() -> None:
    with pytest.raises(InputError, match="24 tokens does not divide a unit of 128"):
        BlockMemory(PagedCache(1, 4, 24, 1, D), Seen(sinks=4, rolling=128), 2, still)
