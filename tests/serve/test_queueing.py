"""Closed forms of The Tail at Scale and of DistServe, against the published numbers."""

import random

import numpy as np
import pytest

from armillary.core.errors import InputError
from armillary.serve.fleet.queueing import any_slow, first_token, first_token_pipelined, first_token_sharded, hedged_share


def test_rare_slowness_adds_up():
    assert any_slow(100, 0.01) == pytest.approx(0.634, abs=5e-4)  # p99 of one of a hundred leaves
    assert any_slow(2000, 0.0001) == pytest.approx(0.18, abs=2e-3)
    assert any_slow(1, 0.3) == pytest.approx(0.3)


def test_hedging_at_a_percentile_costs_what_lies_beyond_it():
    waits = [float(wait) for wait in range(1, 1001)]
    assert hedged_share(waits, 950.0) == 0.05
    assert hedged_share(waits, 1000.0) == 0.0


@pytest.mark.parametrize(("rate", "plain", "pipelined", "sharded"), [(2, 0.1125, 0.1028, 0.0627), (8, 0.3000, 0.1167, 0.0850)])
def test_distserves_times_to_first_token(rate, plain, pipelined, sharded):
    assert first_token(0.1, rate) == pytest.approx(plain, abs=5e-5)
    assert first_token_pipelined(0.1, rate) == pytest.approx(pipelined, abs=5e-5)
    assert first_token_sharded(0.1, rate, 1.7) == pytest.approx(sharded, abs=5e-5)


def test_a_queue_without_an_end_is_refused():
    with pytest.raises(InputError, match="stay under 10 a second"):
        first_token(0.1, 10)


@pytest.mark.parametrize("rate", [2, 6])
def test_a_queue_with_poisson_arrivals_waits_as_long_as_the_formula_says(rate):
    """Lindley's recursion over 300,000 arrivals: within 2 %."""
    rng, wait, total = random.Random(1), 0.0, 0.0
    for _ in range(300_000):
        total += wait + 0.1
        wait = max(0.0, wait + 0.1 - rng.expovariate(rate))
    assert total / 300_000 == pytest.approx(first_token(0.1, rate), rel=0.02)


def test_one_slow_leaf_in_a_hundred_makes_most_answers_slow():
    """Lognormal leaves with 1 % stragglers, 100 to an answer."""
    rng = np.random.default_rng(0)
    leaves = rng.lognormal(0.0, 0.3, (10_000, 100)) + 100.0 * (rng.random((10_000, 100)) < 0.01)
    assert (leaves.max(1) > 50).mean() == pytest.approx(any_slow(100, 0.01), abs=0.02)
