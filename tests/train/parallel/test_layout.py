"""A layout is a value that is right or refused by name."""

from dataclasses import replace

import pytest

from armillary.core.errors import InputError
from armillary.models.config import ModelConfig
from armillary.train.parallel.layout import Layout

MODEL = ModelConfig("llama", 50257, 96, 256, 2, 12, 4, 8, 64)


@pytest.mark.parametrize(
    ("text", "layout", "world", "dp"),
    [
        ("", Layout(), 1, 1),
        ("dp_replicate=2", Layout(dp_replicate=2), 2, 2),
        ("dp_shard=2,tp=4,sequence_parallel", Layout(dp_shard=2, tp=4, sequence_parallel=True), 8, 2),
        (" dp_shard = 4 , zero_stage=2 ", Layout(dp_shard=4, zero_stage=2), 4, 4),
        ("dp_replicate=2,dp_shard=4,sequence_parallel=false", Layout(dp_replicate=2, dp_shard=4), 8, 8),
    ],
)
def test_text_and_layout_are_the_same(text, layout, world, dp):
    assert Layout.parse(text) == layout
    assert layout == Layout.parse(str(layout))
    assert (layout.world, layout.dp) == (world, dp)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("tp=0", "tp is 0"),
        ("dp=2", "no 'dp'"),
        ("tp", "no degree"),
        ("tp=two", "no degree"),
        ("tp=-2", "no degree"),
        ("tp=2,tp=2", "twice"),
        ("sequence_parallel=maybe,tp=2", "sequence_parallel='maybe'"),
        ("sequence_parallel", "tp is 1"),
        ("dp_shard=2,zero_stage=4", "zero_stage is 4"),
        ("dp_shard=2,tp=2,zero_stage=1", "zero_stage=1"),
        ("pp=2", "comes with pipeline schedules"),
        ("cp=2", "comes with context parallelism"),
        ("ep=2", "comes with expert parallelism"),
    ],
)
def test_what_is_wrong_is_named(text, named):
    with pytest.raises(InputError, match=named):
        Layout.parse(text)


def test_the_number_of_ranks_must_be_the_product():
    with pytest.raises(InputError, match=r"for 4 ranks \(dp_shard 2 x tp 2\), but 3 run.*torchrun --nproc-per-node 4"):
        Layout(dp_shard=2, tp=2).check_world(3)


@pytest.mark.parametrize(
    ("tp", "changes", "named"),
    [
        (5, {}, r"tp=5 does not divide num_heads=12: use tp in \{1, 2, 4\}"),
        (3, {"intermediate_size": 300}, "4 key/value heads"),
        (3, {}, "does not divide intermediate_size=256"),
        (12, {"intermediate_size": 240, "vocab_size": 12 * 5 - 10}, "vocabulary of 50"),
    ],
)
def test_a_model_that_tensor_parallelism_does_not_divide_is_refused_with_the_degrees_that_do(tp, changes, named):
    with pytest.raises(InputError, match=named):
        Layout(tp=tp).check_model(replace(MODEL, **changes))


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_an_odd_vocabulary_divides(tp):
    Layout(tp=tp).check_model(MODEL)
