"""Golden values and the laws of every schedule."""

import math
from itertools import pairwise

import pytest

from armillary.core.errors import InputError
from armillary.train.schedules import Schedule

ALL = [
    Schedule("constant", 100, 10),
    Schedule("linear", 100, 10, 0.1),
    Schedule("cosine", 100, 10, 0.1),
    Schedule("wsd", 100, 10, 0.1, 20),
    Schedule("wsd", 100, 10, 0.1, 20, "linear"),
]


@pytest.mark.parametrize("schedule", ALL, ids=str)
def test_rises_to_one_and_never_again(schedule):
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == 1.0
    assert all(a >= b for a, b in pairwise(factors[10:]))
    assert min(factors[10:]) > 0.09
    assert schedule.factor(100) == pytest.approx(1.0 if schedule.name == "constant" else schedule.final) or schedule.name == "wsd"


def test_golden_values():
    assert Schedule("linear", 100).factor(25) == 0.75
    assert Schedule("cosine", 100).factor(50) == pytest.approx(0.5)
    assert Schedule("cosine", 100, final=0.1).factor(50) == pytest.approx(0.55)
    assert Schedule("wsd", 100, 0, 0.0, 20).factor(79) == 1.0
    assert Schedule("wsd", 100, 0, 0.0, 20).factor(85) == pytest.approx(1 - math.sqrt(0.25))
    assert Schedule("wsd", 100, 0, 0.0, 20, "linear").factor(95) == pytest.approx(0.25)


def test_what_does_not_fit_is_refused():
    with pytest.raises(InputError, match="do not fit into 10 steps"):
        Schedule("wsd", 10, 6, 0, 5)
    with pytest.raises(InputError, match="decay is for wsd"):
        Schedule("cosine", 10, 0, 0, 5)
