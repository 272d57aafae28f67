"""H2O: the kept set's size is exact, the last stay, what is attended to stays, and a budget of everything changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import AttentionSpec
from armillary.kernels.heavy_hitters import Budget, HeavyHitters
from armillary.kernels.paged_attention import PagedAttend, PagedCache, Span


def kept_by_definition(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, budget: Budget, block: int) -> tuple[Tensor, list[list[int]]]:
    """Every head on its own, token by token, in float64: outputs [T, Hq, D] and each head's kept positions at the end."""
    group, out, kept = q.shape[1] // k.shape[1], torch.zeros(q.shape, dtype=torch.float64), []
    for head in range(k.shape[1]):
        alive: list[int] = []
        mass: dict[int, float] = {}
        for p in range(len(q)):
            alive.append(p)
            mass[p] = 0.0
            for query in range(head * group, (head + 1) * group):
                weights = (k[alive, head].double() @ q[p, query].double() * spec.scale).softmax(0)
                out[p, query] = weights @ v[alive, head].double()
                for position, weight in zip(alive, weights.tolist(), strict=True):
                    mass[position] += weight
            if (p + 1) % block == 0 and p + 1 > budget.total:
                old, last = alive[: -budget.recent], alive[-budget.recent :]
                alive = [*sorted(sorted(old, key=lambda i: -mass[i])[: budget.heavy]), *last]
        kept.append(alive)
    return out, kept


@pytest.mark.parametrize("chunks", [[97], [1] * 97, [10, 40, 1, 1, 45]])
@pytest.mark.parametrize(("heads", "budget"), [((4, 2), Budget(10, 6)), ((3, 3), Budget(3, 20)), ((6, 1), Budget(24, 1))])
def test_equals_the_definition_however_it_is_cut(chunks: list[int], heads: tuple[int, int], budget: Budget) -> None:
    torch.manual_seed(0)
    (hq, hkv), total, block = heads, 97, 8
    q, k, v = torch.randn(total, hq, 16) * 2, torch.randn(total, hkv, 16), torch.randn(total, hkv, 16)
    spec = AttentionSpec(0, 0.25)
    cache = PagedCache(1, 12, block, hkv, 16)
    state, table = HeavyHitters(cache, budget), torch.randperm(12)[: -(-budget.total // block) + 1].tolist()
    out, at = [], 0
    for count in chunks:
        part = slice(at, at + count)
        out.append(state.attend([Span(at, count, table)])(spec, q[part], k[part], v[part]))
        at += count
    expected, kept = kept_by_definition(spec, q, k, v, budget, block)
    torch.testing.assert_close(torch.cat(out).double(), expected, rtol=0, atol=1e-5)
    count = budget.kept(total, block)
    slots = torch.tensor([b * block + i for b in table for i in range(block)])[:count]
    assert count == len(kept[0]) == budget.total + 1
    for head in range(hkv):
        positions = state.positions[0][slots, head].tolist()
        assert positions == kept[head]
        assert positions[-budget.recent :] == list(range(total - budget.recent, total))
        assert torch.equal(cache.keys[0][slots, head], k[positions, head])
        assert torch.equal(cache.values[0][slots, head], v[positions, head])


def test_a_budget_of_everything_is_bit_equal_to_paged_attention() -> None:
    torch.manual_seed(0)
    q, k, v, spec = torch.randn(60, 4, 16), torch.randn(60, 2, 16), torch.randn(60, 2, 16), AttentionSpec(0, 0.25)
    caches = [PagedCache(1, 8, 8, 2, 16) for _ in range(2)]
    state, table = HeavyHitters(caches[0], Budget(40, 20)), list(range(8))
    for start, count in ((0, 30), (30, 1), (31, 29)):
        part, spans = slice(start, start + count), [Span(start, count, table)]
        assert torch.equal(
            state.attend(spans)(spec, q[part], k[part], v[part]), PagedAttend(caches[1], spans)(spec, q[part], k[part], v[part])
        )


def test_a_planted_heavy_hitter_is_retained() -> None:
    """One early key that every query asks for survives 400 tokens with a budget of 16, in the head that it is planted in."""
    torch.manual_seed(0)
    q, k, v = torch.randn(400, 2, 16), torch.randn(400, 2, 16), torch.randn(400, 2, 16)
    hitter = torch.randn(16)
    k[40, 1] = hitter * 4
    q[:, 1] += hitter
    cache = PagedCache(1, 4, 8, 2, 16)
    state = HeavyHitters(cache, Budget(8, 8))
    state.attend([Span(0, 400, [2, 0, 1])])(AttentionSpec(0, 0.25), q, k, v)
    slots = torch.tensor([b * 8 + i for b in (2, 0) for i in range(8)])
    assert 40 in state.positions[0][slots, 1].tolist()
    assert 40 not in state.positions[0][slots, 0].tolist()


def test_what_cannot_be_is_refused() -> None:
    cache = PagedCache(1, 4, 8, 2, 16)
    with pytest.raises(InputError, match="keeps no recent token"):
        HeavyHitters(cache, Budget(8, 0))
    with pytest.raises(InputError, match="keeps 20 tokens, its 2 KV blocks hold 16"):
        HeavyHitters(cache, Budget(8, 8)).attend([Span(0, 20, [0, 1])])
