"""Latencies count from arrival, and each percentile is a value that occurred."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.units import S
from armillary.serve.latency import Latencies, RequestTiming, TokenTimes
from armillary.serve.request import Event, Request, SamplingParams


def timing(name: str, arrival: int, *tokens: int) -> RequestTiming:
    return RequestTiming(name, 3, arrival, None, tokens)


def test_latencies_of_two_requests_by_hand() -> None:
    latencies = Latencies.of([timing("a", 0, 100, 110, 150), timing("b", 50, 250, 255)])
    assert latencies.first_tokens == (100, 200)
    assert latencies.gaps == (5, 10, 40)
    assert (latencies.first_token(50), latencies.first_token(99), latencies.gap(50), latencies.gap(99)) == (100, 200, 10, 40)
    assert (latencies.requests, latencies.prompt_tokens, latencies.output_tokens, latencies.duration) == (2, 6, 5, 255)
    assert latencies.throughput == pytest.approx(5 * S / 255)


def test_a_request_without_tokens_counts_as_a_request_and_delays_nobody() -> None:
    latencies = Latencies.of([timing("a", 0, 10), timing("refused", 5)])
    assert (latencies.requests, latencies.first_tokens, latencies.gaps) == (2, (10,), ())
    assert latencies.gap(50) is None
    nothing = Latencies.of([])
    assert (nothing.throughput, nothing.first_token(50)) == (0.0, None)


@given(st.integers(0, 10**9), st.lists(st.integers(1, 10**9), min_size=1, max_size=20))
def test_first_token_and_gaps_add_up_to_the_last_token(arrival: int, steps: list[int]) -> None:
    times = [arrival + sum(steps[: index + 1]) for index in range(len(steps))]
    one = timing("a", arrival, *times)
    assert one.time_to_first_token is not None
    assert one.time_to_first_token + sum(one.gaps) == times[-1] - arrival


def test_a_listener_keeps_the_instants_of_tokens_only() -> None:
    request = Request("a", (1, 2), SamplingParams(), arrival=5)
    times = TokenTimes()
    for token, text, at in ((7, "h", 10), (8, "", 20), (None, "i", 25)):
        times(Event("a", token, text, None, None, at))
    one = RequestTiming.of(request, times.times)
    assert (one.prompt_tokens, one.arrival, one.token_times) == (2, 5, (10, 20))
    assert "".join(times.text) == "hi"
