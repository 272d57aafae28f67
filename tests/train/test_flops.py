"""PaLM's published utilisation, and the closed forms of the spec."""

import dataclasses

import pytest
import torch
from tiny import TINY, decoder, documents, pack
from torch.utils.flop_counter import FlopCounterMode

from armillary.core.units import S
from armillary.kernels import linear
from armillary.models.config import ModelConfig
from armillary.train.flops import flops_per_token, hardware_flops, model_flops, parameters_in_products
from armillary.train.memory.checkpointing import apply_checkpointing
from armillary.train.meter import Meter
from armillary.train.parallel.curve import FAMILIES
from armillary.train.trainer import StepResult


def test_palm_540b_used_46_2_percent_of_6144_tpus():
    peak, rate = 6144 * 275e12, 238.3e3
    assert rate * flops_per_token(540_350_000_000, 118, 48, 256, 2048) / peak == pytest.approx(0.462, abs=5e-4)
    assert rate * 6 * 540_350_000_000 / peak == pytest.approx(0.457, abs=5e-4)  # without attention


def test_a_model_counts_itself_as_palm_does():
    config = ModelConfig("llama", 49152, 576, 1536, 30, 9, 3, 64, 8192, tie_embeddings=True)
    assert parameters_in_products(config) == config.parameters() == 134_515_008
    expected = 1024 * flops_per_token(134_515_008, 30, 9, 64, 1024)
    assert model_flops(config, 1024, 1024 * 1024) == expected
    assert model_flops(config, 4 * 256, 4 * 256 * 256) == 1024 * flops_per_token(134_515_008, 30, 9, 64, 256)
    assert parameters_in_products(dataclasses.replace(config, tie_embeddings=False)) == 134_515_008  # the other table is only looked up


def test_a_window_bounds_what_a_token_attends_to():
    windowed = dataclasses.replace(TINY, windows=(16, None))
    full, half = model_flops(TINY, 64, 64 * 64), model_flops(windowed, 64, 64 * 64)
    assert full - half == 12 * 4 * 6 * (64 * 64 - 16 * 64)


@pytest.mark.parametrize("config", [TINY, FAMILIES["gemma2"]], ids=["llama", "gemma2"])
def test_what_is_computed_again_is_what_torch_counts(config, monkeypatch):
    """In matrix products: the block's last one is needed only where a norm follows it. Full checkpointing does attention again as well."""
    monkeypatch.setattr(linear, "onednn_is_faster", lambda: False)  # torch's counter knows torch's own products only
    batch = pack(documents(5))
    tokens, attended = len(batch.tokens), sum(n * n for n in batch.lengths)
    tokens_of_model = batch.tokens % config.vocab_size

    def counted(plan):
        model = decoder(config=config)
        apply_checkpointing(model, plan)
        with FlopCounterMode(display=False) as counter:
            model.hidden(tokens_of_model, batch.positions, batch.attend).sum().backward()
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    def again(plan):
        return hardware_flops(config, tokens, attended, plan) - model_flops(config, tokens, attended)

    plain = counted(["none", "none"])
    for plan in (["none", "selective"], ["attention", "none"], ["attention", "attention"]):
        assert again(plan) == counted(plan) - plain, plan
    for layer, plan in enumerate((["full", "none"], ["none", "full"])):
        window = config.window(layer)
        pairs = attended if window is None else min(attended, window * tokens)
        assert again(plan) == counted(plan) - plain + 4 * config.num_heads * config.head_dim * pairs, plan


def test_a_meter_averages_over_its_window_and_counts_all_tokens():
    def result(step, seconds):
        return StepResult(step, 2.0, 1.0, 1e-3, 1000, 900, 1000 * 10, seconds * S, seconds * S // 10)

    meter = Meter(TINY, 100, peak=1e9)
    for step in range(1, 11):
        meter.read(result(step, 4), 0)
    for step in range(11, 31):
        reading = meter.read(result(step, 2), 5)
    assert (reading.tokens, reading.tokens_per_second, reading.seconds_left, reading.memory) == (30_000, 500.0, 140.0, 5)
    assert reading.waited == pytest.approx(0.1)
    assert reading.mfu == reading.hfu == pytest.approx(model_flops(TINY, 500, 5000) / 1e9)
    assert Meter(TINY, 100).read(result(1, 1), 0).mfu is None
