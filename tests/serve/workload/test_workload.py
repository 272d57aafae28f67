"""Workloads have the rates, variations and lengths that they are asked for; traces are read as they are."""

from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError, NotFoundError
from armillary.serve.workload import bursty, fixed, poisson, published, requests, steady
from armillary.serve.workload.lengths import fitted, names
from armillary.serve.workload.requests import arrivals

# Of the whole traces: tokens of prompts (mean, median, 90 %) and answers, counted when the tables were made.
TRACES = {
    "conversation": ((1154.7, 1020, 2734.5), (211.1, 129, 424)),
    "code": ((2047.8, 1469, 5187.6), (27.9, 13, 55)),
    "summarization": ((2588.1, 2730, 3702), (291.4, 167, 372)),
}


@pytest.mark.parametrize("name", names())
def test_published_lengths_are_their_traces(name):
    drawn = np.array(list(islice(published(name).draw(seed=1), 100_000)))
    for column, (mean, median, ninety) in enumerate(TRACES[name]):
        values = drawn[:, column]
        assert values.mean() == pytest.approx(mean, rel=0.03)
        assert np.quantile(values, 0.5) == pytest.approx(median, rel=0.02)
        assert np.quantile(values, 0.9) == pytest.approx(ninety, rel=0.02)


@given(st.integers(0, 5), st.integers(2, 40), st.integers(2, 5000))
def test_a_limit_holds_for_both_together(seed, limit, count):
    for prompt, answer in islice(published("code").draw(seed, limit), min(count, 50)):
        assert prompt >= 1 <= answer
        assert prompt + answer <= limit


def test_fitted_lengths_keep_the_correlation_of_ranks():
    generator = np.random.default_rng(0)
    prompts = generator.integers(1, 4000, 20_000)
    answers = prompts // 8 + generator.integers(1, 300, 20_000)
    law = fitted("made up", prompts, answers)
    drawn = np.array(list(islice(law.draw(), 20_000)))
    again = fitted("again", drawn[:, 0], drawn[:, 1])
    assert again.correlation == pytest.approx(law.correlation, abs=0.02)


@pytest.mark.parametrize(("variation", "rate"), [(1.0, 5.0), (3.0, 2.0), (0.25, 10.0)])
def test_arrivals_have_their_rate_and_variation(variation, rate):
    gaps = np.diff(list(islice(bursty(rate, variation, seed=3), 200_000))) / 1e9
    assert 1 / gaps.mean() == pytest.approx(rate, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(variation, rel=0.03)


def test_a_seed_says_it_all():
    assert list(islice(poisson(3, 5), 100)) == list(islice(poisson(3, 5), 100)) != list(islice(poisson(3, 6), 100))
    assert list(islice(steady(4), 3)) == [250_000_000, 500_000_000, 750_000_000]


def test_requests_have_the_lengths_and_times_of_their_arrivals():
    made = list(requests(arrivals(steady(1), fixed(7, 3), 2)))
    assert [(one.arrival, len(one.prompt), one.sampling.max_tokens) for one in made] == [(10**9, 7, 3), (2 * 10**9, 7, 3)]


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf")])
def test_what_is_no_rate_is_refused(rate):
    with pytest.raises(InputError, match="no rate"):
        next(poisson(rate))


def test_unknown_lengths_name_the_known():
    with pytest.raises(NotFoundError, match="conversation, code, summarization"):
        published("poems")
