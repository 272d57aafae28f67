"""Curves through measured iterations: a known machine is found again, and many decodes cost what each of them does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.sim.batch import Batch
from armillary.sim.costs import Fitted
from armillary.sim.costs.fitted import Curve, Host
from armillary.sim.costs.fitting import Sample, fit

MODEL = Fitted(
    "made up",
    Curve((1, 16, 512), (3.1e6, 3.3e6, 130.7e6)),
    Curve((0, 1, 64), (0, 0.4e6, 9.3e6)),
    Curve((1, 64, 512), (900.3, 260.1, 170.9)),
    [(1, Curve((0, 512, 2048), (0, 0.31e6, 1.7e6))), (8, Curve((0, 512, 2048), (0, 0.2e6, 1.1e6)))],
    Host(0.2e6, 11e3, 33e3),
)


@given(st.integers(1, 40), st.integers(0, 10**5), st.integers(1, 40))
def test_many_decodes_are_each_of_them(sequences, cached, count):
    each = [MODEL.iteration(Batch((), sequences, cached + i * sequences, sequences)) for i in range(count)]
    assert MODEL.decodes(sequences, cached, count).tolist() == each


@given(st.lists(st.floats(0, 1e4), min_size=1, max_size=5), st.integers(1, 4))
def test_a_curve_of_many_is_the_curve_of_each(xs, points):
    curve = Curve((1, 16, 512, 700)[:points], (3.1e6, 3.3e6, 130.7e6, 140e6)[:points])
    assert curve.many(np.array(xs)).tolist() == [curve(x) for x in xs]


def measured(noise, seed=0):
    """A grid like the one that `calibrate` measures, of a machine that is `true`, and what a trial gives."""
    generator, samples = np.random.default_rng(seed), []

    def add(batch, whole=False):
        ns, host = ((1 + noise * generator.standard_normal()) * part for part in true(batch))
        samples.append(Sample(batch, max(1, round(ns)), round(host) if whole else None))

    for tokens in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512):
        add(Batch(((tokens, 0),)))
        add(Batch(((tokens, 0),), sampled=1))
    for query in (16, 64, 128, 256, 512):
        for cached in (256, 512, 1024):
            add(Batch(((query, cached),)))
    for sequences in (1, 2, 4, 8, 16, 32):
        for context in (16, 128, 512, 1024):
            add(Batch((), sequences, sequences * context, sequences))
    for _ in range(60):
        pieces = tuple((int(generator.integers(1, 400)), int(generator.integers(0, 500))) for _ in range(generator.integers(0, 3)))
        decodes = int(generator.integers(1, 30))
        add(Batch(pieces, decodes, int(decodes * generator.integers(16, 900)), decodes + len(pieces)), whole=True)
    return samples


def true(batch):
    """ns of the executor and of the host on a machine whose kernels work in tiles of 4 tokens."""
    pairs = sum(query * (cached + (query + 1) / 2) for query, cached in batch.prompts)
    host = 3e5 + 2e4 * batch.sequences + 5e4 * len(batch.prompts)
    return 4e6 + 2.6e5 * -(-batch.tokens // 4) * 4 + 1.4e5 * batch.sampled + 200 * pairs + 310 * batch.cached, host


def test_a_known_machine_is_found_again():
    model = fit("found", measured(noise=0.01))
    assert model.errors.median < 0.015
    assert model.errors.p90 < 0.05
    generator = np.random.default_rng(1)
    for _ in range(200):  # iterations that nobody measured
        piece = (int(generator.integers(1, 480)), int(generator.integers(0, 600)))
        decodes = int(generator.integers(0, 32))
        batch = Batch((piece,), decodes, int(decodes * generator.integers(1, 1000)), decodes + 1)
        assert model.iteration(batch) == pytest.approx(sum(true(batch)), rel=0.07)
    assert (model.host.fixed, model.host.per_sequence) == (pytest.approx(3e5, rel=0.05), pytest.approx(2e4, rel=0.05))
    assert fit("found", measured(noise=0.01)).iteration(batch) == model.iteration(batch)


def test_noise_makes_no_iteration_shorter():
    noisy = fit("noisy", [sample for seed in range(4) for sample in measured(noise=0.12, seed=seed)])
    off = [noisy.iteration(sample.batch) / sum(true(sample.batch)) - 1 for sample in measured(noise=0.0)]
    assert abs(np.mean(off)) < 0.02


def slower(samples, every, times):
    return [Sample(one.batch, round(one.ns * times), one.host) if place % every == 3 else one for place, one in enumerate(samples)]


def test_a_timer_that_was_interrupted_bends_no_curve():
    batch = Batch(((200, 100),), 8, 4000, 9)
    found = fit("d", slower(measured(noise=0.0), 17, 5)).iteration(batch)
    assert 1 < found / sum(true(batch)) < 1.1  # and not 1 + 4/17


def test_what_now_and_then_takes_longer_is_in_the_sum():
    samples = [sample for seed in range(4) for sample in slower(measured(noise=0.02, seed=seed), 5, 1.6) if sample.host is not None]
    model = fit("skewed", samples)
    said = sum(model.iteration(sample.batch) - model.host.of(sample.batch) for sample in samples)
    assert said == pytest.approx(sum(sample.ns for sample in samples), rel=0.02)


def test_too_few_are_refused():
    with pytest.raises(InputError, match="give no curves"):
        fit("few", measured(0.0)[:4])
    with pytest.raises(InputError, match="0 ns"):
        fit("none", [*measured(0.0), Sample(Batch((), 1, 1, 1), 0)])
