"""Sarathi-Serve's cost model is the published profile, and its scheduling keeps an SLO that prompts first break."""

from __future__ import annotations

import pytest

from armillary.core.units import MS
from armillary.reproduce import sarathi


def test_an_iteration_costs_what_the_profile_says_and_between_its_points_in_proportion() -> None:
    assert [round(sarathi.iteration(tokens) / MS, 2) for tokens in (1, 64, 512, 2048)] == [9.34, 9.73, 33.6, 134.4]
    assert sarathi.iteration(288) == pytest.approx((sarathi.iteration(64) + sarathi.iteration(512)) / 2)
    assert sarathi.iteration(4096) > 1.9 * sarathi.iteration(2048)


def test_the_workload_at_another_rate_is_the_same_work_sooner() -> None:
    slow, fast = sarathi.workload(1.0, 30), sarathi.workload(2.0, 30)
    assert [(len(r.prompt), r.sampling.max_tokens) for r in slow] == [(len(r.prompt), r.sampling.max_tokens) for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([2 * (r.arrival or 0) for r in fast], abs=2)


@pytest.mark.slow
def test_at_a_rate_where_prompts_first_break_the_slo_nearly_twice_of_it_is_kept_in_chunks() -> None:
    """The experiment's lower bound on the ratio of capacities, 1.8, without its searches."""
    assert not sarathi.keeps_the_slo("vllm", 8192, 1.3)
    assert sarathi.keeps_the_slo("sarathi", 512, 1.8 * 1.3)
