"""Rings move what no algorithm could move less of."""

import pytest

from armillary.core.errors import InputError
from armillary.sim.collectives import seconds, terms


@pytest.mark.parametrize("ranks", [2, 3, 8, 64])
def test_an_all_reduce_is_a_reduce_scatter_and_an_all_gather(ranks):
    parts = [seconds(name, 1e8, ranks, 1e11, 1e-6) for name in ("reduce_scatter", "all_gather")]
    assert seconds("all_reduce", 1e8, ranks, 1e11, 1e-6) == pytest.approx(sum(parts))


def test_a_large_all_reduce_moves_twice_the_tensor_less_one_part():
    assert seconds("all_reduce", 8e9, 8, 1e11, 0) == pytest.approx(2 * 7 / 8 * 8e9 / 1e11)


def test_one_rank_has_nobody_to_talk_to():
    assert terms("all_reduce", 1) == (0, 0)
    assert terms("send", 2) == (1, 1)


def test_an_unknown_collective_is_named():
    with pytest.raises(InputError, match="'gossip'"):
        terms("gossip", 4)
