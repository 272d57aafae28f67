"""DeepSpeed files as users write them: carried over, or refused by the name of what is missing."""

import pytest

from armillary.core.config import resolve
from armillary.core.errors import InputError
from armillary.train.config import TrainConfig
from armillary.train.deepspeed import from_deepspeed

USUAL = {
    "train_batch_size": 64,
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "steps_per_print": 10,
    "fp16": {"enabled": False, "loss_scale": 0},
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e8, "offload_optimizer": {"device": "none"}},
    "optimizer": {"type": "AdamW", "params": {"lr": 3e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}},
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10, "total_num_steps": 500, "warmup_type": "linear"}},
    "wall_clock_breakdown": False,
    "flops_profiler": {"enabled": False, "profile_step": 1},
}


def test_a_usual_file_becomes_a_configuration():
    imported = from_deepspeed(USUAL, world=2)
    config = resolve(TrainConfig, environment={}, flags=imported.flags).value
    assert (config.batch.rows, config.batch.micro_rows, config.clip_norm, config.precision) == (64, 8, 0.5, "bf16")
    assert (config.layout, config.steps, config.schedule.name, config.schedule.warmup) == ("dp_shard=2,zero_stage=2", 500, "linear", 10)
    assert config.optimizer.options() == {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    assert [note.split(" has no effect")[0] for note in imported.notes] == [
        "optimizer.params.weight_decay is for matrices: norms and biases are not decayed here",
        "scheduler.params.warmup_max_lr is absent: the learning rate is optimizer.params.lr, not DeepSpeed's default of 0.001",
        "zero_optimization.overlap_comm",
        "zero_optimization.reduce_bucket_size",
        "steps_per_print",
        "wall_clock_breakdown",
    ]


def test_two_of_the_three_batch_sizes_are_enough():
    assert from_deepspeed({"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 3}, 2).flags["batch.rows"] == 24
    assert from_deepspeed({"train_batch_size": 24, "gradient_accumulation_steps": 3}, 2).flags["batch.micro_rows"] == 4
    assert from_deepspeed({"train_batch_size": 24, "train_micro_batch_size_per_gpu": 4}, 2).flags["batch.rows"] == 24
    assert from_deepspeed({}).flags == {}


def test_what_is_absent_is_deepspeeds_default_or_said():
    raw = {
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam"},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 0}},
    }
    imported = from_deepspeed(raw)
    config = resolve(TrainConfig, environment={}, flags=imported.flags).value
    assert config.clip_norm is None
    assert config.optimizer.options() == {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    assert (config.schedule.name, config.schedule.final, config.schedule.warmup) == ("cosine", 1e-4, 0)
    assert imported.notes == ()
    told = from_deepspeed({"optimizer": {"type": "Lion"}}).notes
    assert [note.split(",")[0] for note in told] == ["gradient_clipping is absent", "scheduler is absent"]


def test_fp16_keeps_its_first_scale():
    flags = from_deepspeed({"fp16": {"enabled": True, "initial_scale_power": 12, "loss_scale": 0}}).flags
    assert (flags["precision"], flags["loss_scale"]) == ("fp16", 4096.0)


@pytest.mark.parametrize(
    ("raw", "told"),
    [
        ({"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1}, "train_batch_size 10 is not"),
        ({"train_batch_size": 9, "gradient_accumulation_steps": 2}, "does not divide"),
        ({"optimizer": {"type": "OneBitAdam"}}, "optimizer.type is not supported .'OneBitAdam'"),
        ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "adam_w_mode"),
        ({"optimizer": {"type": "AdamW", "params": {"amsgrad": True}}}, "optimizer.params.amsgrad"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "zero_optimization.offload_param"),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, "zero_hpz_partition_size"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5"),
        ({"scheduler": {"type": "OneCycle"}}, "scheduler.type"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 5}}}, "warmup_type"),
        ({"scheduler": {"type": "WarmupLR"}}, "warmup_num_steps is absent: write it: DeepSpeed's default is 1000"),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, "fp16.loss_scale"),
        ({"fp16": {"enabled": True, "hysteresis": 2}}, "fp16.hysteresis"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "both enabled"),
        ({"train_batch_size": "auto"}, 'is "auto"'),
        ({"sparse_attention": {"mode": "fixed"}}, "sparse_attention"),
        ({"gradient_clipping": "big"}, "gradient_clipping is 'big'"),
        ({"optimizer": 3}, "optimizer is 3"),
    ],
)
def test_what_has_no_counterpart_is_refused_by_name(raw, told):
    with pytest.raises(InputError, match=told):
        from_deepspeed(raw)
