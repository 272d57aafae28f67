"""Pope et al.: every row holds, and the formulas choose as the paper says."""

import pytest

from armillary.models.graph import partition
from armillary.reproduce import registry


def test_every_row_holds():
    assert [row.quantity for row in registry.get("pope").run().rows if not row.holds] == []


def test_the_best_split_and_gather_are_where_the_formulas_are_least():
    hidden, inner, chips = 18432, 73728, 64
    assert partition.stationary_2d(1, hidden, inner, chips) == pytest.approx(8 * hidden / chips**0.5)
    assert partition.gathered(10**5, hidden, inner, chips) == pytest.approx(4 * hidden * (10**5 * inner / chips) ** 0.5)
    for other in (1, 2, 8, 16):
        assert partition.stationary_2d(1, hidden, inner, chips, other) >= partition.stationary_2d(1, hidden, inner, chips)
        assert partition.gathered(10**5, hidden, inner, chips, other) >= partition.gathered(10**5, hidden, inner, chips)


@pytest.mark.parametrize(
    ("tokens", "chips", "name"), [(64, 8, "1d weight-stationary"), (64, 64, "2d weight-stationary"), (10**6, 64, "weight-gathered")]
)
def test_few_chips_split_one_way_many_two_and_a_large_batch_stays_where_it_is(tokens, chips, name):
    assert partition.best(tokens, 18432, 73728, chips)[0] == name
