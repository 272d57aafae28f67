"""The closed forms of speculative decoding, and draft lengths against brute force."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.serve.speculation.adaptive import GUESSED_SLOPE, IterationCost
from armillary.serve.speculation.formulas import best_length, expected_tokens, speedup
from armillary.serve.speculation.length import best_lengths


@pytest.mark.parametrize(
    ("a", "g", "c", "tokens", "gain"),
    [
        (0.75, 7, 0.02, 3.600, 3.157),
        (0.62, 7, 0.02, 2.574, 2.258),
        (0.65, 5, 0.02, 2.642, 2.402),
        (0.53, 5, 0.02, 2.081, 1.891),
        (0.8, 5, 0.04, 3.689, 3.074),
    ],
)
def test_the_papers_table(a, g, c, tokens, gain):
    assert expected_tokens(a, g) == pytest.approx(tokens, abs=6e-4)
    assert speedup(a, g, c) == pytest.approx(gain, abs=6e-4)


@pytest.mark.parametrize(("c", "best"), [(0.05, (3, 4, 6, 8, 13)), (0.1, (2, 3, 4, 6, 10))])
def test_the_best_length_is_the_known_one_and_ours_for_a_batch_of_one(c, best):
    for a, g in zip((0.5, 0.6, 0.7, 0.8, 0.9), best, strict=True):
        assert best_length(a, c) == g
        assert best_lengths([a], [64], fixed=1.0, per_token=0.0, per_draft=c) == [g]


@given(a=st.floats(0.0, 1.0), c=st.floats(0.001, 1.5))
def test_drafting_pays_exactly_when_a_draft_is_accepted_more_often_than_it_costs(a, c):
    if abs(a - c) > 1e-6:
        assert (best_length(a, c) > 0) == (a > c)
    assert speedup(a, 1, c) == pytest.approx((1 + a) / (1 + c))


def test_tokens_a_pass_are_what_random_acceptance_gives():
    draw, a, g = random.Random(3), 0.7, 4
    runs = [1 + next((k for k in range(g) if draw.random() >= a), g) for _ in range(40_000)]
    assert sum(runs) / len(runs) == pytest.approx(expected_tokens(a, g), abs=0.03)


@given(
    acceptance=st.lists(st.floats(0.0, 0.999), min_size=1, max_size=3),
    bounds=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    fixed=st.floats(0.1, 10),
    per_token=st.floats(0.0, 2),
    per_draft=st.floats(0.0, 2),
)
@settings(max_examples=200, deadline=None)
def test_no_other_lengths_give_more_tokens_a_second(acceptance, bounds, fixed, per_token, per_draft):
    most = bounds[: len(acceptance)]

    def rate(lengths):
        tokens = sum(expected_tokens(a, g) for a, g in zip(acceptance, lengths, strict=True))
        return tokens / (fixed + per_token * (len(acceptance) + sum(lengths)) + per_draft * sum(lengths))

    found = best_lengths(acceptance, most, fixed=fixed, per_token=per_token, per_draft=per_draft)
    assert all(0 <= g <= bound for g, bound in zip(found, most, strict=True))
    best = max(rate(lengths) for lengths in itertools.product(*(range(bound + 1) for bound in most)))
    assert rate(found) >= best * (1 - 1e-6)


def test_an_iterations_cost_is_found_and_followed():
    cost = IterationCost()
    assert cost.fit() == (1.0, GUESSED_SLOPE)
    for _ in range(9):
        cost.observe(4, 5_000)
    fixed, slope = cost.fit()
    assert fixed + 4 * slope == pytest.approx(5_000)
    assert slope == pytest.approx(GUESSED_SLOPE * fixed)
    for tokens in (1, 5, 9, 33) * 40:
        cost.observe(tokens, 3_000 + 200 * tokens)
    assert cost.fit() == pytest.approx((3_000, 200), rel=0.02)
    for tokens in (1, 5, 9, 33) * 60:
        cost.observe(tokens, 8_000 + 20 * tokens)
    assert cost.fit() == pytest.approx((8_000, 20), rel=0.05)
