"""What an engine may be told."""

import pytest
from pydantic import ValidationError

from armillary.core.config import resolve
from armillary.core.errors import ArmillaryError, InputError
from armillary.serve.config import DEFAULT_KV_MEMORY, EngineConfig
from armillary.serve.engine import Engine


@pytest.mark.parametrize(
    ("given", "blocks"),
    [({"kv_blocks": 9}, 9), ({"kv_memory": "1 MB"}, 62), ({"kv_memory": 16_000}, 1), ({}, DEFAULT_KV_MEMORY // 16_000)],
)
def test_the_pool_is_as_many_whole_blocks_as_fit(given, blocks):
    settled = EngineConfig(block_size=16, **given).with_pool(bytes_per_token=1000)
    assert settled.kv_blocks == blocks
    assert settled.with_pool(bytes_per_token=5) == settled


def test_memory_below_one_block_is_refused():
    with pytest.raises(InputError, match="kv_memory of 15,999 bytes does not hold one KV block of 16 tokens \\(16,000 bytes\\)"):
        EngineConfig(kv_memory=15_999).with_pool(bytes_per_token=1000)


@pytest.mark.parametrize(
    "bad",
    [
        {"policy": "fifo"},
        {"kv_blocks": 4, "kv_memory": 4},
        {"block_size": 0},
        {"max_batch_tokens": 0},
        {"max_running": 0},
        {"kv_blokcs": 4},
        {"tbt_target": "0ms"},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises((ArmillaryError, ValidationError)):
        EngineConfig(**bad)


def test_an_engine_wants_a_settled_pool():
    with pytest.raises(InputError, match="the size of the KV pool is not settled"):
        Engine(None, EngineConfig())


def test_settings_come_from_file_environment_and_flags(tmp_path):
    file = tmp_path / "serve.toml"
    file.write_text('kv_memory = "2 MB"\nmax_running = 3\n')
    resolved = resolve(EngineConfig, file, {"ARMILLARY_MAX_RUNNING": "5"}, {"policy": "orca"})
    assert (resolved.value.kv_memory, resolved.value.max_running, resolved.value.policy) == (2_000_000, 5, "orca")
    with pytest.raises(InputError, match="did you mean 'kv_blocks'"):
        resolve(EngineConfig, None, {}, {"kv_blokcs": 4})
    with pytest.raises(InputError, match="both set the size of the KV pool"):
        resolve(EngineConfig, None, {}, {"kv_blocks": 4, "kv_memory": "1 GB"})
    with pytest.raises(ArmillaryError, match="no scheduler policy is called 'fifo'"):
        resolve(EngineConfig, None, {}, {"policy": "fifo"})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kv_window": 100}, "kv_window 100 says nothing with kv_policy dense"),
        ({"kv_policy": "quest", "kv_sinks": 8}, "kv_sinks 8 says nothing with kv_policy quest"),
        ({"kv_policy": "h2o", "prefix_cache": "off", "kv_dense_layers": 1}, "kv_dense_layers 1 says nothing with kv_policy h2o"),
        ({"draft_tokens": 4}, "draft_tokens 4 says nothing with speculate off"),
        ({"speculate": "ngram", "draft_layers": 0.3}, "draft_layers 0.3 says nothing with speculate ngram"),
    ],
)
def test_what_nothing_would_look_at_is_refused(given, said):
    with pytest.raises(ValidationError, match=said):
        EngineConfig(**given)
    EngineConfig(**{name: value for name, value in given.items() if not said.startswith(name)})
