"""Sparse prefill (MInference): planted columns and diagonals are recalled, all indices are everything, and work is counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armillary.kernels.attention import AttentionSpec, CausalAttend
from armillary.kernels.paged_attention import PagedCache, Span
from armillary.kernels.sparse_prefill import BLOCK, KINDS, Index, Kind, Pattern, SparsePrefill, Work, recall, search, sums

SCALE = 0.25


def planted(length: int, columns: list[int], diagonals: list[int]) -> tuple[Tensor, Tensor]:
    """q, k [length, 64] whose attention lies on some columns and at some distances: one-hot codes of positions, far apart."""
    torch.manual_seed(0)
    d = 512
    codes = torch.nn.functional.normalize(torch.randn(length, d), dim=-1)
    marker = torch.nn.functional.normalize(torch.randn(d), dim=-1)
    k, q = codes.clone(), torch.zeros(length, d)
    k[columns] += marker
    q += 50 * marker
    for position in range(length):
        for distance in diagonals:
            if position >= distance:
                q[position] += 50 * codes[position - distance]
    return q, k


@pytest.mark.parametrize("rows", [1, 5, 64])
def test_sums_over_columns_and_diagonals(rows: int) -> None:
    weights = torch.rand(rows, 100).masked_fill(torch.arange(100) > torch.arange(100 - rows, 100)[:, None], 0.0)
    columns, diagonals = sums(weights)
    torch.testing.assert_close(columns, weights.sum(0))
    for distance in range(100):
        expected = sum(float(weights[row, 100 - rows + row - distance]) for row in range(rows) if 100 - rows + row - distance >= 0)
        assert float(diagonals[distance]) == pytest.approx(expected, abs=1e-5)


def test_planted_columns_and_diagonals_are_recalled() -> None:
    """Over 95 % of the mass at a tenth of the keys, where the other patterns miss it; the search says so."""
    q, k = planted(1000, [130, 404, 655], [77, 200, 300])
    pattern, found = search(q, k, SCALE, 4, 16, 64)
    assert pattern.kind == "vertical-slash"
    assert found > 0.95
    assert recall(Pattern("a-shape", 4, 16, 64), q, k, SCALE) < 0.5
    index = Index(pattern, q, k, 0, SCALE)
    seen = index.seen(999, torch.tensor([999]))[0]
    assert bool(seen[[130, 404, 655, 999 - 77, 999 - 200, 999 - 300]].all())
    assert int(seen.sum()) <= pattern.reads_all


def test_local_heads_and_block_heads_get_their_patterns() -> None:
    torch.manual_seed(0)
    length, d = 1024, 256
    local_q, local_k = planted(length, [0, 1], list(range(40, 80)))
    assert search(local_q, local_k, SCALE, 4, 16, 128)[0].kind == "a-shape"
    topic = torch.nn.functional.normalize(torch.randn(length // BLOCK, d), dim=-1)
    k = topic.repeat_interleave(BLOCK, 0)  # what a block is about; queries ask for the topic of a block far from them
    q = 60 * topic[(torch.arange(length) // BLOCK * 7) % torch.arange(length).div(BLOCK, rounding_mode="floor").clamp(min=1)]
    pattern, found = search(q, k, SCALE, 4, 16, 128)
    assert pattern.kind == "block-sparse"
    assert found > 0.9


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunks", [[300], [70, 130, 1, 99]])
def test_reading_everything_is_exact(kind: Kind, chunks: list[int]) -> None:
    """Every index: the result is dense attention's, and so is the count of work."""
    torch.manual_seed(0)
    q, k, v = torch.randn(300, 4, 16), torch.randn(300, 2, 16), torch.randn(300, 2, 16)
    spec, cache, work = AttentionSpec(0, SCALE), PagedCache(1, 20, 16, 2, 16), Work()
    small, every = Pattern(kind, 0, 1, 0), Pattern(kind, 0, 1, 640)
    calls = iter([small])  # the bound below which nothing is sparse; what is then read is all
    out, at, table = [], 0, torch.randperm(20).tolist()
    for count in chunks:
        calls = iter([small])
        attend = SparsePrefill(cache, [Span(at, count, table, 300)], lambda layer, head, calls=calls: next(calls, every), work)
        part = slice(at, at + count)
        out.append(attend(spec, q[part], k[part], v[part]))
        at += count
    torch.testing.assert_close(torch.cat(out), CausalAttend([300])(spec, q, k, v), rtol=0, atol=2e-6)
    assert work.dense == 4 * (300 * 301 // 2 - (201 if len(chunks) > 1 else 0))  # a single token is no prompt's piece


def test_it_computes_what_its_pattern_says_and_leaves_decodes_alone() -> None:
    """A batch of a prompt's piece and a decoding sequence: the second equals dense attention, the first costs a fraction."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2001, 2, 16), torch.randn(2001, 1, 16), torch.randn(2001, 1, 16)
    spec, work = AttentionSpec(0, SCALE), Work()
    pattern = Pattern("a-shape", 4, 60, 64)
    cache = PagedCache(1, 130, 16, 1, 16)
    spans = [Span(0, 1, [129], 1), Span(0, 2000, range(125), 2000)]
    out = SparsePrefill(cache, spans, lambda layer, head: pattern, work)(spec, q, k, v)
    torch.testing.assert_close(out[0], v[0].expand(2, -1))
    position = 1500
    seen = [0, 1, 2, 3, *range(position - 123, position + 1)]
    weights = ((k[1:][seen, 0] @ q[1 + position, 1]) * SCALE).softmax(0)
    torch.testing.assert_close(out[1 + position, 1], weights @ v[1:][seen, 0], rtol=0, atol=2e-6)
    assert work.dense == 2 * 2000 * 2001 // 2
    assert work.computed / work.dense < 0.2
