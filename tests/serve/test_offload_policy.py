"""FlexGen's policy, cost model and linear program: the closed forms, the figures of its own model, and no better policy by enumeration."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import CapacityError, InputError
from armillary.core.units import GIB
from armillary.serve.offload.cost import T4, Work, peak_rows, price
from armillary.serve.offload.placement import best_fractions, best_placement
from armillary.serve.offload.policy import OffloadPolicy, Split, Tier

OPT_30B = Work(layers=48, hidden=7168, inner=28672, heads=56, prompt=512, answer=32, block=144, batch=48)
PAPER = Split(0.2, 0.8), Split(0.0, 1.0), Split(0.0, 1.0)  # 20 80 0 100 0 100


def test_opt_30b_on_a_t4_costs_what_flexgens_model_says():
    found = price(OPT_30B, *PAPER)
    assert OPT_30B.layers * OPT_30B.layer_bytes / GIB == pytest.approx(55.125, abs=1e-9)
    assert found.prefill == pytest.approx(4.38897, abs=5e-6)
    assert found.generation == pytest.approx(0.292402, abs=5e-7)
    assert found.total == pytest.approx(645.76, abs=5e-3)
    assert found.throughput == pytest.approx(7.1357, abs=5e-5)


def test_peaks_are_what_lives_in_a_tier_and_the_buffers():
    w, h, s, n = OPT_30B.layer_bytes, 7168, 512, 32
    peaks = price(OPT_30B, Split(1.0), Split(1.0), Split(1.0)).peaks
    inside = 48 * (18 * s * h + 2 * 56 * s * s + 2 * s * 28672)
    assert peaks["arena, prefill"] == pytest.approx(48 * w + 2 * s * h * 144 + 4 * (s + n) * h * 144 * 48 + inside)
    assert (peaks["RAM, prefill"], peaks["disk"]) == (0.0, 0.0)
    on_disk = price(OPT_30B, Split(0.0, 0.0, 1.0), Split(0.0, 0.0, 1.0), Split(0.0, 1.0)).peaks
    assert on_disk["disk"] == pytest.approx(48 * w + 4 * (s + n) * h * 144 * 48)
    assert on_disk["arena, prefill"] == pytest.approx(2 * w + 2 * s * h * 48 + inside)  # two buffers of weights


@pytest.mark.parametrize("memory", [15 * GIB, 24 * GIB, 40 * GIB])
def test_no_enumerated_policy_is_better_than_the_linear_program(memory):
    hardware, steps = replace(T4, arena=memory), np.linspace(0, 1, 6)
    best = best_fractions(OPT_30B, hardware)
    triples = [(a, b, 1 - a - b) for a, b in itertools.product(steps, steps) if a + b <= 1 + 1e-9]
    splits = [Split(*(max(0.0, share) for share in shares)) for shares in triples]
    tried = 0
    for weights, cache, hidden in itertools.product(splits, splits, [one for one in splits if one.disk < 1e-9]):
        at = np.array([1.0, *weights.shares, *cache.shares, *hidden.shares])
        if any(used @ at > limit for used, limit in peak_rows(OPT_30B, hardware).values()):
            continue
        tried += 1
        assert price(OPT_30B, weights, cache, hidden, hardware).total >= best.price.total * (1 - 1e-6)
    assert tried > 10


def test_the_optimum_fits_and_the_best_of_several_sizes_is_the_best():
    best = best_placement(OPT_30B, [(bls * gbs, gbs) for gbs in (16, 32, 48) for bls in (1, 3, 6)])
    limits = peak_rows(best.work, T4)
    assert all(best.price.peaks[name] <= limit * (1 + 1e-6) for name, (_, limit) in limits.items())
    assert best.price.throughput >= best_fractions(OPT_30B).price.throughput


def test_what_fits_nowhere_is_refused():
    with pytest.raises(CapacityError, match="block of 144 sequences in batches of 48"):
        best_fractions(OPT_30B, replace(T4, arena=1 * GIB))
    with pytest.raises(InputError, match="whole number of batches"):
        replace(OPT_30B, batch=50)


@settings(max_examples=50)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.tuples(st.integers(0, 10), st.integers(0, 10), st.integers(0, 10)))
def test_whole_pieces_meet_the_shares_to_within_the_largest(sizes, weights):
    total = sum(weights)
    if not total:
        return
    split = Split(*(weight / total for weight in weights))
    placed = split.place(sizes)
    for tier in Tier:
        held = sum(size for size, where in zip(sizes, placed, strict=True) if where is tier)
        assert abs(held - split.shares[tier] * sum(sizes)) <= 2 * max(sizes)
        if split.shares[tier] == 0:
            assert held == 0


def test_a_policy_is_read_as_it_is_written():
    policy = OffloadPolicy.parse("weights=20/80/0, cache=0/100/0,hidden=0/100/0,batches=3")
    assert policy == OffloadPolicy(Split(0.2, 0.8), Split(0, 1), Split(0, 1), 3)
    assert OffloadPolicy.parse(str(policy)) == policy
    assert OffloadPolicy.parse("weights=0/50/50") == OffloadPolicy(Split(0, 0.5, 0.5))
    for wrong, message in (
        ("weights=20/90/0", "add up to 100"), ("weight=1/99/0", "no part of"), ("batches=0", "give 1 to"), ("", "no part of"),
        ("weights=100/0/0,weights=0/100/0", "no part of"), ("cache=1e1/90/0", "no part of"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            OffloadPolicy.parse(wrong)
