"""Gaps between tokens in bounded memory: rounded finely, none lost."""

import numpy as np

from armillary.serve.simulation import recorder
from armillary.serve.simulation.recorder import Recorder


def test_many_gaps_are_rounded_and_counted(monkeypatch):
    one, other = Recorder(), Recorder()
    values = np.random.default_rng(0).integers(1_000_000, 80_000_000, 5000)
    for kept in (one, other):
        kept._gaps.extend(values.tolist())
        kept._counts.extend([3] * len(values))
    monkeypatch.setattr(recorder, "_STEPS", 1 << 6)
    one._fold()
    one._fold()  # what is rounded stays as it is
    assert len(one._gaps) < 64 * 8
    assert one.result().gap_counts.sum() == 3 * len(values)
    for percent in (1, 50, 99, 99.9):
        assert abs(one.result().gap(percent) / other.result().gap(percent) - 1) <= 1 / 128
