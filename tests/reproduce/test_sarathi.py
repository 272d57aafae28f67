"""Sarathi-Serve's scheduling keeps an SLO that prompts first break, at the paper's scale."""

from __future__ import annotations

import pytest

from armillary.reproduce import recorded, sarathi


def test_the_lengths_are_those_of_the_paper() -> None:
    """Table 2, within what a sample of 345 can say: three standard errors of a median and of a 90th percentile."""
    import numpy as np

    found = recorded.columns("openchat_sharegpt4")
    for name, median, high in (("prompt", 1730, 5696), ("answer", 415, 834)):
        assert np.quantile(found[name], 0.5 - 0.081) < median < np.quantile(found[name], 0.5 + 0.081)
        assert np.quantile(found[name], 0.9 - 0.048) < high < np.quantile(found[name], 0.9 + 0.048)


def test_the_workload_at_another_rate_is_the_same_work_sooner() -> None:
    slow, fast = list(sarathi.workload(1.0, count=30)), list(sarathi.workload(2.0, count=30))
    assert [(len(r.prompt), r.sampling.max_tokens) for r in slow] == [(len(r.prompt), r.sampling.max_tokens) for r in fast]
    assert [r.arrival for r in slow] == pytest.approx([2 * (r.arrival or 0) for r in fast], abs=2)


@pytest.mark.parametrize("setup", [sarathi.MISTRAL, sarathi.YI, sarathi.LLAMA, sarathi.FALCON], ids=lambda one: one.model)
def test_where_whole_prompts_break_the_strict_slo_chunks_keep_it(setup: sarathi.Setup) -> None:
    """At the rate of the search's beginning, with a quarter of its requests."""
    rate, slo = 0.6 * sarathi.ceiling(setup), setup.slo["strict"]
    gaps = {policy: sarathi.serve(setup, policy, sarathi.workload(rate, count=64), 512).gap(99) for policy in ("sarathi", "vllm")}
    assert gaps["sarathi"] <= slo < gaps["vllm"]
