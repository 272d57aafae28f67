"""tf.data's guide in virtual time: every row holds."""

from __future__ import annotations

import pytest

from armillary.reproduce import registry, tf_data


def test_the_autotuner_is_near_the_best_of_the_grid_on_pipelines_that_its_own_test_does_not_draw() -> None:
    assert all(tf_data.share_of_the_best(seed) >= 0.95 for seed in range(1000, 1006))


@pytest.mark.slow
def test_every_row_holds() -> None:
    result = registry.get("tf-data").run()
    assert [row.quantity for row in result.rows if not row.holds] == []
    assert [len(trace) > 0 for _, trace in result.pictures] == [True] * 5
