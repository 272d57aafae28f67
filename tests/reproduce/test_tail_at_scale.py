"""The Tail at Scale: every row holds; the percentile that is kept up to date is the percentile."""

import numpy as np
import pytest

from armillary.reproduce import registry, tail_at_scale


def test_every_row_holds(monkeypatch):
    monkeypatch.setattr(tail_at_scale, "_FANOUTS", 2500)
    assert [row.quantity for row in registry.get("tail-at-scale").run().rows if not row.holds] == []


def test_the_percentile_of_what_came_is_known_at_any_time():
    late, values = tail_at_scale.Late(), np.random.default_rng(0).integers(0, 10**6, 3000)
    for value in values.tolist():
        late.add(value)
    assert late.value() == pytest.approx(np.percentile(values, 95), rel=0.005)
    assert tail_at_scale.Late().value() is None
