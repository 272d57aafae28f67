"""One curve: every layout trains the same models to the same losses as one process, and clips by the same norm."""

from dataclasses import replace
from functools import cache, partial

import pytest
import torch

from armillary.core.errors import InputError
from armillary.train.config import OptimizerConfig
from armillary.train.optimizers.choose import factory
from armillary.train.parallel.apply import Single
from armillary.train.parallel.curve import (
    FAMILIES,
    global_batch,
    layout_curve,
    plain_adamw,
    simulated_curves,
    single_curve,
    small_decoder,
    train,
)
from armillary.train.parallel.launch import spawn
from armillary.train.parallel.layout import Layout
from armillary.train.parallel.parallelize import parallelize
from armillary.train.parallel.rank_threads import run_ranks
from armillary.train.precision import LossScaler
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

BOUND = 2e-6
PARAMETERS = 1e-5  # a hundredth of a step: Adam makes whole steps of gradients that are nothing but rounding
UNEVEN = replace(FAMILIES["everything"], vocab_size=53)


@cache
def reference(family, microbatches, clip_norm=None):
    return single_curve(FAMILIES[family], microbatches=microbatches, clip_norm=clip_norm)


def check(curve, expected):
    assert curve.loss_difference(expected) <= BOUND
    assert curve.parameter_difference(expected) <= PARAMETERS
    assert max(abs(a / b - 1) for a, b in zip(curve.norms, expected.norms, strict=True)) <= BOUND


def on_threads(text, family, microbatches, **options):
    layout = Layout.parse(text)
    curves = run_ranks(
        layout.world, lambda _: layout_curve(layout, FAMILIES[family], microbatches=microbatches, replicas="buckets", **options)
    )
    assert all(curve.losses == curves[0].losses and curve.norms == curves[0].norms for curve in curves)
    return curves[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["dp_shard=8", "dp_replicate=8"])
def test_one_micro_batch_a_rank_summed_in_rank_order_keeps_every_loss_to_the_last_bit(text, family):
    curve = on_threads(text, family, 8)
    assert curve.losses == reference(family, 8).losses
    check(curve, reference(family, 8))


@pytest.mark.parametrize("text", ["dp_replicate=2,dp_shard=4", "dp_shard=4,zero_stage=2", "dp_replicate=4"])
def test_data_parallel_layouts_with_several_micro_batches_a_rank(text):
    check(on_threads(text, "everything", 8), reference("everything", 8))


@pytest.mark.slow
@pytest.mark.parametrize("text", ["dp_shard=2,tp=2", "dp_replicate=2,dp_shard=2,tp=2,sequence_parallel", "dp_replicate=2,tp=4"])
def test_products_with_tensor_parallelism(text):
    check(on_threads(text, "everything", 4), reference("everything", 4))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "family"),
    [("tp=8", "everything"), ("tp=8,sequence_parallel", "qwen3"), ("tp=2,sequence_parallel", "gemma2"), ("dp_replicate=4,tp=2", "qwen2")],
)
def test_eight_simulated_ranks(text, family):
    layout = Layout.parse(text)
    curve, expected = reversed(simulated_curves(layout, FAMILIES[family], microbatches=layout.dp, steps=2))
    check(curve, expected)


def frozen_decoder():
    """The embedding (tied to the head), a norm and a projection are not trained."""
    model = small_decoder(FAMILIES["everything"])
    for frozen in (model.embed_tokens, model.layers[0].input_layernorm, model.layers[1].self_attn.qkv.k_proj):
        frozen.requires_grad_(False)
    return model


@pytest.mark.parametrize("text", ["dp_shard=4", "dp_replicate=4", "tp=2,sequence_parallel"])
def test_frozen_parameters_stay_and_the_others_train_as_ever(text):
    layout, config = Layout.parse(text), FAMILIES["everything"]

    def work(_):
        return train(parallelize(frozen_decoder(), layout, replicas="buckets"), config, microbatches=4, steps=2)

    curve = run_ranks(layout.world, work)[0]
    check(curve, train(Single(frozen_decoder()), config, microbatches=4, steps=2))
    kept = {name: value for name, value in frozen_decoder().named_parameters() if not value.requires_grad}
    assert kept
    assert all(torch.equal(curve.parameters[name], value) for name, value in kept.items())


@pytest.mark.parametrize("text", ["dp_shard=4", "dp_replicate=2,dp_shard=2"])
def test_clipping_by_the_norm_of_the_whole_gradient(text):
    expected = reference("everything", 4, clip_norm=0.3)
    assert min(expected.norms) > 0.3
    check(on_threads(text, "everything", 4, clip_norm=0.3), expected)


def real_ranks(rank, texts, config, clip_norm):
    curves = {text: layout_curve(Layout.parse(text), config, microbatches=4, clip_norm=clip_norm) for text in texts}
    return {text: replace(curve, parameters=curve.parameters if rank == 0 else {}) for text, curve in curves.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("texts", "config", "clip_norm"),
    [
        (
            ("dp_replicate=2", "dp_shard=2,zero_stage=1", "dp_shard=2,zero_stage=2", "dp_shard=2", "tp=2", "tp=2,sequence_parallel"),
            UNEVEN,
            0.3,
        ),
        (("dp_shard=2,tp=2,sequence_parallel", "dp_replicate=2,tp=2", "dp_replicate=2,dp_shard=2"), UNEVEN, None),
    ],
)
def test_real_processes_over_gloo(texts, config, clip_norm):
    world = Layout.parse(texts[0]).world
    curves = spawn(world, real_ranks, texts, config, clip_norm)
    expected = single_curve(config, microbatches=4, clip_norm=clip_norm)
    for text in texts:
        check(curves[0][text], expected)
        assert all(rank[text].losses == curves[0][text].losses for rank in curves)


OTHERS = {"muon": {}, "lion": {}, "adafactor": {"beta1": 0.9}}


def under_every_optimizer(rank, texts):
    def run(text, name):
        parallel = parallelize(small_decoder(UNEVEN), Layout.parse(text)) if text else Single(small_decoder(UNEVEN))
        return train(parallel, UNEVEN, microbatches=4, optimizer=factory(OptimizerConfig(name=name, lr=1e-3, **OTHERS[name])))

    return {(text, name): run(text, name) for text in texts for name in OTHERS}


@pytest.mark.slow
def test_every_optimizer_takes_the_steps_of_one_process():
    """Muon orthogonalises whole matrices and Adafactor averages over rows and columns that lie on several ranks."""
    expected = under_every_optimizer(0, ("",))
    for (text, name), curve in spawn(4, under_every_optimizer, ("dp_shard=4,zero_stage=1", "dp_shard=4", "dp_shard=2,tp=2"))[0].items():
        assert curve.loss_difference(expected["", name]) <= BOUND, (text, name)
        assert curve.parameter_difference(expected["", name]) <= PARAMETERS, (text, name)


def test_ranks_whose_weights_differ_are_refused_by_the_parameters_name():
    def work(rank):
        model = small_decoder(FAMILIES["llama"])
        if rank == 1:
            model.layers[1].mlp.down_proj.weight.data[3, 4] += 1e-6
        with pytest.raises(InputError, match=r"layers.1.mlp.down_proj.weight is not the same on all ranks \(1 of 21"):
            parallelize(model, Layout(dp_shard=2))

    run_ranks(2, work)


def test_found_inf_on_one_rank_is_known_to_all():
    def work(rank):
        parallel = parallelize(small_decoder(FAMILIES["llama"]), Layout(dp_shard=4))
        return [parallel.any_rank(rank == 2), parallel.any_rank(False)]

    assert run_ranks(4, work) == [[True, False]] * 4


def test_lower_precision_is_the_same_under_every_layout():
    """bfloat16 passes over float32 weights: sharded and replicated ranks cast the same way."""

    def work(text, _):
        layout = Layout.parse(text)
        parallel = parallelize(small_decoder(FAMILIES["llama"]), layout, compute_dtype=torch.bfloat16, replicas="buckets")
        return train(parallel, FAMILIES["llama"], microbatches=2, steps=2)

    curves = [run_ranks(2, partial(work, text))[0] for text in ("dp_shard=2", "dp_replicate=2")]
    assert curves[0].loss_difference(curves[1]) <= BOUND


def in_fp16(rank, texts):
    """Losses, scales and skips; the first scale overflows twice."""

    def run(text):
        parallel = (
            parallelize(small_decoder(UNEVEN), Layout.parse(text), compute_dtype=torch.float16)
            if text
            else Single(small_decoder(UNEVEN), torch.float16)
        )
        trainer = Trainer(parallel, plain_adamw, Schedule("constant", 4), iter(()), clip_norm=0.3, scaler=LossScaler(2.0**21, interval=2))
        share = 4 // parallel.dp_world
        begin = parallel.dp_rank * share
        return [trainer.step(global_batch(step, 53, 4)[begin : begin + share]) for step in range(4)]

    return {text: [(result.loss, result.loss_scale, result.skipped) for result in run(text)] for text in texts}


@pytest.mark.slow
def test_all_layouts_scale_and_skip_in_fp16_as_one_process():
    expected = in_fp16(0, ("",))[""]
    assert {skipped for _, _, skipped in expected} == {True, False}
    ranks = spawn(4, in_fp16, ("dp_replicate=4", "dp_shard=4", "dp_shard=4,zero_stage=1", "dp_shard=2,tp=2", "dp_replicate=2,tp=2"))
    assert all(told == ranks[0] for told in ranks)
    for text, told in ranks[0].items():
        assert [step[1:] for step in told] == [step[1:] for step in expected], text
        # A split product rounds its halves to fp16 before they are added.
        bound = 1e-3 if "tp" in text else BOUND
        assert max(abs(a[0] - b[0]) for a, b in zip(told, expected, strict=True)) <= bound, text
