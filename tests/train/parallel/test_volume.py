"""The closed forms give the papers' numbers."""

import pytest

from armillary.train.parallel.volume import tensor_parallel_layer_bytes, vocabulary_parallel_loss_bytes, zero_bytes, zero_elements


def test_zero_papers_table():
    # Rajbhandari et al. 2020, figure 1: 7.5 billion parameters on 64 ranks.
    assert [round(zero_bytes(7_500_000_000, 64, stage) / 1e9, 2) for stage in (0, 1, 2, 3)] == [120, 31.41, 16.64, 1.88]


def test_stage_three_moves_half_as_much_again():
    assert [zero_elements(64, stage, 64) / 63 for stage in (0, 1, 2, 3)] == [2, 2, 2, 3]


def test_a_tensor_parallel_layer():
    # Shoeybi et al. 2019: two all-reduces of [b*s, h] forward; GPT-3's layer over 8 ranks in 16 bits.
    assert tensor_parallel_layer_bytes(2048, 12288, 8, 2) == pytest.approx(2 * 2 * 7 / 8 * 2048 * 12288 * 2)
    # The loss moves 12 bytes a token instead of 4 a token and vocabulary entry.
    assert vocabulary_parallel_loss_bytes(1000, 8) == 2 * 7 / 8 * 12 * 1000
