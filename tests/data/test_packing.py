"""First-fit decreasing: equal to the plainest loop, within its bound, nothing lost."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.data.packing import first_fit_decreasing


def plain(lengths: list[int], capacity: int) -> list[int]:
    room: list[int] = []
    bins = [0] * len(lengths)
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [number for number, left in enumerate(room) if left >= lengths[item]]
        number = fitting[0] if fitting else len(room)
        if not fitting:
            room.append(capacity)
        room[number] -= lengths[item]
        bins[item] = number
    return bins


@given(st.lists(st.integers(1, 40), max_size=80), st.integers(40, 64))
def test_equals_the_plainest_loop(lengths: list[int], capacity: int) -> None:
    assert first_fit_decreasing(lengths, capacity).tolist() == plain(lengths, capacity)


def test_is_within_the_proven_bound_of_the_optimum() -> None:
    lengths = np.random.default_rng(0).integers(1, 2049, 20_000)
    bins = first_fit_decreasing(lengths, 2048)
    used = np.bincount(bins, weights=lengths)
    assert used.max() <= 2048
    assert used.size <= 11 / 9 * -(-lengths.sum() // 2048) + 6 / 9


def test_an_item_that_cannot_fit_is_refused() -> None:
    with pytest.raises(InputError, match=r"outside 1 \.\. 8"):
        first_fit_decreasing([3, 9], 8)
