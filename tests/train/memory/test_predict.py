"""The prediction beside the step: the most bytes that were alive at once."""

import pytest
import torch
from tiny import Repeat

from armillary.models.config import ModelConfig
from armillary.models.decoder import Decoder
from armillary.train.config import OptimizerConfig
from armillary.train.memory.checkpointing import apply_checkpointing
from armillary.train.memory.counter import Alive
from armillary.train.memory.predict import predict
from armillary.train.microbatch import MicroBatch
from armillary.train.optimizers.choose import factory
from armillary.train.parallel.apply import Single
from armillary.train.schedules import Schedule
from armillary.train.trainer import Trainer

CONFIG = ModelConfig("llama", 512, 64, 160, 4, 4, 2, 16, 256, tie_embeddings=True)
LENGTHS = (128, 100, 28)
TOLERANCE = 0.10  # of the peak


def measured(optimizer, plan, micro_batches, compute_dtype):
    model = Decoder(CONFIG)
    apply_checkpointing(model, plan)
    tokens = torch.randint(0, 512, (sum(LENGTHS),))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])
    batch = [MicroBatch(tokens, tokens, positions, LENGTHS)] * micro_batches
    run = Trainer(Single(model, compute_dtype), factory(OptimizerConfig(name=optimizer)), Schedule("constant", 4), Repeat(batch))
    run.step(batch)
    run.optimizer.zero_grad(set_to_none=True)
    state = [value for entries in run.optimizer.state.values() for value in entries.values() if isinstance(value, torch.Tensor)]
    with Alive([*model.parameters(), *state]) as alive:
        run.step(batch)
    return alive.peak, sum(value.nbytes for value in state)


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lion", "adafactor"])
@pytest.mark.parametrize(
    ("level", "micro_batches", "compute_dtype"), [("none", 1, None), ("full", 1, None), ("selective", 3, None), ("none", 2, torch.bfloat16)]
)
def test_the_peak_is_predicted_to_a_tenth(optimizer, level, micro_batches, compute_dtype):
    plan = [level] * 4
    peak, state = measured(optimizer, plan, micro_batches, compute_dtype)
    told = predict(CONFIG, LENGTHS, optimizer, micro_batches=micro_batches, plan=plan, compute_dtype=compute_dtype)
    assert told.parameters == told.gradients == 4 * CONFIG.parameters()
    assert told.optimizer == pytest.approx(state, rel=0.001, abs=200)  # step counters are left out
    assert told.peak == pytest.approx(peak, rel=TOLERANCE)


def test_checkpointing_lowers_the_predicted_peak():
    peaks = [predict(CONFIG, (256, 256), plan=[level] * 4).peak for level in ("none", "selective", "attention", "full")]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4


def test_zeros_7_5_billion_parameters_are_predicted_without_memory():
    config = ModelConfig("llama", 32_000, 4096, 11_008, 32, 32, 32, 128, 4096)
    told = predict(config, (256,))
    assert told.parameters + told.gradients + told.optimizer == 16 * config.parameters()
    assert told.peak > 16 * config.parameters()
    assert [row[0] for row in told.table()] == ["parameters", "gradients", "optimizer", "activations", "peak"]
