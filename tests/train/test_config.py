"""Every key bounded, none ignored, and a resolved file that reads back to itself."""

import pytest

from armillary.core.config import documented_keys, from_text, resolve
from armillary.core.errors import InputError
from armillary.train.config import TrainConfig


def settle(**flags):
    return resolve(TrainConfig, environment={}, flags={key.replace("__", "."): value for key, value in flags.items()})


def test_a_resolved_configuration_reads_back(tmp_path):
    mixture = {"a": {"folder": "x", "weight": 2.0}, "b": {"folder": "y", "count": 3}}
    resolved = settle(optimizer__name="muon", optimizer__betas=(0.8, 0.9), data__mixture=mixture, clip_norm=0.5)
    resolved.save(tmp_path / "config.toml")
    again = resolve(TrainConfig, file=tmp_path / "config.toml", environment={})
    assert again.value == resolved.value
    assert "lr" in (tmp_path / "config.toml").read_text()


def test_a_model_has_one_origin():
    with pytest.raises(InputError, match=r"model = 'smollm2' has an architecture of its own, and architecture.layers is given too"):
        settle(model="smollm2", architecture__layers=3)


def test_an_optimizer_refuses_what_it_lacks():
    with pytest.raises(InputError, match="lion has no momentum"):
        settle(optimizer__name="lion", optimizer__momentum=0.9)
    with pytest.raises(InputError, match="betas are"):
        settle(optimizer__betas=(0.9, 1.5))
    assert settle(optimizer__name="lion").value.optimizer.options() == {"lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.1}


def test_flags_are_read_by_their_keys_type():
    assert from_text(TrainConfig, "optimizer.betas", "[0.8, 0.9]") == [0.8, 0.9]
    assert from_text(TrainConfig, "model", "3") == "3"
    assert from_text(TrainConfig, "schedule.warmup", "none") is None
    with pytest.raises(InputError, match=r"did you mean --optimizer\.lr\?"):
        from_text(TrainConfig, "optimizer.lrr", "1")


def test_every_key_says_what_it_means():
    assert [key for key, _, meaning in documented_keys(TrainConfig) if len(meaning) < 8] == []
