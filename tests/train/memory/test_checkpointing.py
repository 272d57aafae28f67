"""What is computed again changes memory and nothing else; a budget is met with the least arithmetic."""

import itertools
from dataclasses import replace

import pytest
import torch
from tiny import TINY, decoder, documents, pack, trainer

from armillary.core.errors import InputError
from armillary.kernels.attention import CausalAttend
from armillary.models.config import ModelConfig
from armillary.train.memory.checkpointing import LEVELS, Option, apply_checkpointing, measure_options, plan_for_budget
from armillary.train.memory.counter import Alive, SavedTensors
from armillary.train.parallel.curve import FAMILIES, single_curve, small_decoder, train
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks

GEMMA = replace(
    TINY, architecture="gemma2", windows=(3, None), attention_softcap=20.0, sandwich_norms=True, norm_offset=1.0, activation="gelu_tanh"
)
WIDE = ModelConfig("llama", 64, 64, 160, 3, 4, 2, 16, 256, tie_embeddings=True)


@pytest.mark.parametrize("config", [TINY, replace(TINY, qk_norm=True, qkv_bias=True), GEMMA], ids=["llama", "qwen", "gemma"])
@pytest.mark.parametrize("plan", [*([level] * 2 for level in LEVELS[1:]), ["full", "selective"], ["none", "attention"]], ids=str)
def test_losses_and_weights_are_equal_bit_for_bit(config, plan):
    batch = [pack(documents(4)), pack(documents(3, seed=1))]
    plain, again = trainer(batch, decoder(0, config)), trainer(batch, decoder(0, config))
    names = [name for name, _ in again.parallel.named_parameters()]
    apply_checkpointing(again.parallel.model, plan)
    assert [name for name, _ in again.parallel.named_parameters()] == names
    for _ in range(3):
        assert plain.step(batch).loss == again.step(batch).loss
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters, again.parameters, strict=True))


def held(config, plan, lengths):
    """Bytes alive between forward and backward, beyond the parameters and the last output, on real tensors."""
    model = decoder(0, config)
    apply_checkpointing(model, plan)
    tokens = torch.zeros(sum(lengths), dtype=torch.int64)
    with Alive(model.parameters()) as alive:
        out = model.hidden(tokens, tokens, CausalAttend(lengths))
    kept = alive.bytes
    del out
    return kept


def test_each_level_keeps_what_was_measured_on_fakes_and_less_than_the_one_before():
    lengths = (40, 24)
    options = measure_options(WIDE, lengths)
    base = held(WIDE, ["full"] * 3, lengths)
    by_level = {option.level: option for option in options[0]}
    assert [option.bytes for option in options[0]] == sorted((option.bytes for option in options[0]), reverse=True)
    assert [option.cost for option in options[0]] == sorted(option.cost for option in options[0])
    assert by_level["full"].bytes == 64 * 64 * 4  # tokens x width x fp32: the block's input
    for level in LEVELS[:-1]:
        grown = held(WIDE, [level] * 3, lengths) - base
        assert grown == pytest.approx(3 * (by_level[level].bytes - by_level["full"].bytes), rel=0.02)


def test_what_no_checkpointing_keeps_is_what_autograd_saved():
    lengths = (64,)
    model = decoder(0, WIDE)
    block = model.layers[0]
    x = torch.randn(64, 64, requires_grad=True)
    angles = model.rope(torch.arange(64), x.dtype)
    with SavedTensors([*block.parameters(), *angles]) as saved:
        out = block(x * 1.0, angles, CausalAttend(lengths))
    option = measure_options(WIDE, lengths)[0][0]
    assert out.requires_grad
    assert saved.bytes == pytest.approx(option.bytes, rel=0.05)


def exhaustive(options, budget):
    plans = [plan for plan in itertools.product(*options) if sum(option.bytes for option in plan) <= budget]
    return min((sum(option.cost for option in plan) for plan in plans), default=None)


def test_a_budget_is_met_at_the_least_cost_of_all_plans():
    chosen = torch.Generator().manual_seed(0)
    for _ in range(30):
        options = []
        for _ in range(4):
            sizes = sorted(torch.randint(1, 1000, (4,), generator=chosen).tolist(), reverse=True)
            costs = sorted(torch.randint(0, 1000, (4,), generator=chosen).tolist())
            options.append([Option(level, size, cost) for level, size, cost in zip(LEVELS, sizes, costs, strict=True)])
        least, most = (sum(pick(o.bytes for o in block) for block in options) for pick in (min, max))
        for budget in (least, (least + most) // 2, most):
            plan = plan_for_budget(options, budget)
            picked = [next(o for o in block if o.level == level) for block, level in zip(options, plan, strict=True)]
            assert sum(option.bytes for option in picked) <= budget
            # Rounding can hide a plan that fits to within a 500th of the budget.
            assert (
                exhaustive(options, budget)
                <= sum(option.cost for option in picked)
                <= exhaustive(options, max(least, budget - budget // 500))
            )
        assert plan_for_budget(options, 10**9) == ("none",) * 4


def test_a_budget_that_nothing_meets_is_refused():
    options = measure_options(WIDE, (64,))
    with pytest.raises(InputError, match=r"memory.budget = .* is below the 49.2 kB that the blocks' inputs take"):
        plan_for_budget(options, 40_000)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["dp_shard=2", "tp=2,sequence_parallel"])
@pytest.mark.parametrize("level", ["selective", "full"])
def test_under_every_layout_the_curve_is_that_of_one_process(text, level):
    config, layout = FAMILIES["everything"], Layout.parse(text)

    def work(_):
        model = small_decoder(config)
        apply_checkpointing(model, [level] * config.num_layers)
        return train(parallelize(model, layout, replicas="buckets"), config, microbatches=4)

    curve, expected = run_ranks(layout.world, work)[0], single_curve(config, microbatches=4)
    assert curve.loss_difference(expected) <= 2e-6
    assert curve.parameter_difference(expected) <= 1e-5
