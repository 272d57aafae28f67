"""Low-rank terms: the packed layout refuses what does not fit, and the plain term is what a merged weight would add."""

from __future__ import annotations

import pytest
import torch

from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.cpu_library import PARTS
from armillary.kernels.low_rank import LowRank, PackedLowRank, add_terms

SHAPES = [(32, 24), (16, 24), (16, 24), (24, 32), (40, 24), (40, 24), (24, 40)]


def low(shape: tuple[int, int], rank: int = 3) -> LowRank:
    n, k = shape
    return LowRank(torch.randn(rank, k), torch.randn(n, rank), 0.5)


def test_terms_are_what_the_merged_weight_adds_and_only_to_their_rows() -> None:
    torch.manual_seed(0)
    one, two, x, y = low((40, 24)), low((40, 24), 7), torch.randn(9, 24), torch.randn(9, 40)
    before = y.clone()
    add_terms(y, x, [(torch.tensor([0, 4, 8]), one), (torch.tensor([3]), two), (torch.tensor([5]), None)])
    expected = before.clone()
    expected[[0, 4, 8]] += x[[0, 4, 8]] @ one.delta().T
    expected[3] += two.delta() @ x[3]
    torch.testing.assert_close(y, expected)
    assert torch.equal(y[[1, 2, 5, 6, 7]], before[[1, 2, 5, 6, 7]])


def test_a_pair_must_agree_on_its_rank() -> None:
    with pytest.raises(InputError, match="no low-rank pair"):
        LowRank(torch.zeros(3, 4), torch.zeros(5, 2), 1.0)


@pytest.mark.skipif(not cpu_library.available(), reason="the native kernels need g++")
def test_packing_refuses_an_adapter_of_another_model() -> None:
    layer = [low(shape) for shape in SHAPES]
    assert PackedLowRank([layer], SHAPES, 1).nbytes > 0
    with pytest.raises(InputError, match="has 1 layers, the model 2"):
        PackedLowRank([layer], SHAPES, 2)
    with pytest.raises(
        InputError, match=r"layers\[0\].o_proj of the adapter stands beside a weight of \[32, 24\], the model's is \[24, 32\]"
    ):
        PackedLowRank([[*layer[:3], low((32, 24)), *layer[4:]]], SHAPES, 1)
    assert len(PARTS) == len(SHAPES)
