"""FlexGen's planner: the paper's block by its own model, arithmetic that adds up, no better percentages, and words for what cannot be."""

from dataclasses import replace

import pytest

from armillary.cluster.cluster import cluster
from armillary.core.errors import CapacityError, InputError
from armillary.core.units import GIB
from armillary.models.graph.parameters import kv_elements, mlp
from armillary.models.graph.published import architecture
from armillary.plan.offload import search, work_of
from armillary.plan.offload_place import place
from armillary.plan.offload_terms import full, phases
from armillary.serve.offload.cost import T4, Work, peak_rows, price
from armillary.serve.offload.placement import best_fractions

OPT = architecture("opt-30b")


@pytest.fixture(scope="module")
def t4():
    return place(cluster("t4"), None)


@pytest.fixture(scope="module")
def found(t4):
    return search(work_of(OPT, t4, 512, 32, False), t4)


def test_the_block_of_opt_30b_on_a_t4_is_the_paper_s(found):
    """144 sequences in batches of 48, keys and activations in RAM; the paper has a fifth of the weights on the GPU, which its own model calls too much."""
    assert (found.best.work.block, found.best.work.batch) == (144, 48)
    assert str(found.policy.cache) == str(found.policy.hidden) == "0/100/0"
    assert 6.9 < found.price.throughput < 7.1357 + 0.2
    assert found.best.work == replace(Work(48, 7168, 28672, 56, 512, 32, 144, 48), queries=7168, keys=7168)


def test_the_arithmetic_adds_up(found):
    first, token = phases(found)
    work, policy = found.best.work, found.policy
    assert first.seconds == pytest.approx(found.price.prefill) == max(first.terms.values())
    assert token.seconds == pytest.approx(found.price.generation) == pytest.approx(token.first + max(token.terms.values()))
    away = policy.weights.ram * work.layer_bytes
    assert token.carried["RAM to accelerator"] == pytest.approx(away + 2 * 7168 * 144)
    assert token.carried["RAM to accelerator"] / T4.ram_to_arena == pytest.approx(token.first)
    assert first.carried["accelerator to RAM, keys and values"] == pytest.approx(4 * 513 * 7168 * 144)
    assert "disk to RAM" not in token.carried
    assert full(found) == ["arena, prefill"]


def test_no_size_and_no_rounding_is_better(found, t4):
    assert all(found.best.price.throughput >= one.price.throughput for one in found.tried)
    peaks = peak_rows(found.best.work, t4.hardware(found.best.work))
    assert all(found.price.peaks[name] <= limit * (1 + 1e-9) for name, (_, limit) in peaks.items() if name.startswith("arena"))
    sums = [split.arena + split.ram + split.disk for split in (found.policy.weights, found.policy.cache, found.policy.hidden)]
    assert sums == pytest.approx([1.0] * 3)


def test_a_layer_of_grouped_queries_has_the_architecture_s_bytes(t4):
    for name in ("llama-2-70b", "opt-30b", "qwen2.5-7b"):
        model = architecture(name)
        work = work_of(model, t4, 128, 16, False)
        attention = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
        weights = mlp(model, 0) - (model.mlp_bias and model.intermediate_size + model.hidden_size)
        assert work.layer_bytes == 2 * (attention + weights)
        assert 2 * work.widths[1] == kv_elements(model)


def test_keys_move_where_no_processor_attends_to_them():
    work = Work(48, 7168, 28672, 56, 512, 32, 144, 48)
    away = best_fractions(work)
    moved = price(work, away.weights, away.cache, away.hidden, replace(T4, cpu=0.0))
    assert moved.generation > away.price.generation
    assert moved.peaks["arena, generation"] > away.price.peaks["arena, generation"]


def test_a_tier_of_no_size_gets_nothing(t4):
    without = replace(t4, disk=0)
    found = search(work_of(OPT, without, 512, 32, False), without, most=64)
    assert {one.weights.disk + one.cache.disk + one.hidden.disk for one in found.tried} == {0.0}


def test_what_does_not_fit_says_by_how_much_and_what_would(t4):
    small = replace(t4, ram=64 * GIB, disk=0)
    with pytest.raises(CapacityError, match=r"weights of 348 GB .* GB more than 80%.*--compress int4"):
        search(work_of(architecture("opt-175b"), small, 512, 32, False), small)
    with pytest.raises(CapacityError, match=r"buffers take .* of the accelerator .*--accelerator-memory"):
        search(work_of(OPT, replace(t4, arena=1 * GIB), 512, 32, False), replace(t4, arena=1 * GIB))
    with pytest.raises(InputError, match="how much memory"):
        place(cluster("h100"), None)
    with pytest.raises(InputError, match="how fast the disk"):
        place(cluster("h100"), None, ram=10**12, disk=10**12)
    with pytest.raises(InputError, match="no measured rates"):
        place(cluster("epyc-7742"), None, arena=10**9)
    with pytest.raises(InputError, match="more than the 2,048"):
        work_of(OPT, t4, 2048, 1, False)
