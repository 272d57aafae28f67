"""What a request for memory asks too much of is known before torch is loaded. The arithmetic of the pool: test_llm, test_local."""

import subprocess
import sys

import pytest
from models import tiny

from armillary.core.errors import InputError
from armillary.kernels.cpu_step import StepCache
from armillary.serve.config import EngineConfig
from armillary.serve.kv_pool import kv_bytes_per_token, settle
from armillary.serve.llm import KV_DTYPES


def test_torch_is_not_needed_to_settle_a_pool() -> None:
    program = (
        "import sys, armillary.models.config_file, armillary.models.gguf.metadata, armillary.serve.kv_pool; print('torch' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ran.stdout == "False\n"


def test_a_token_takes_what_the_native_cache_holds_for_it() -> None:
    config = tiny().config
    for name, dtype in KV_DTYPES.items():
        cache = StepCache(config.num_layers, 4, 16, config.num_kv_heads, config.head_dim, dtype)
        assert cache.nbytes == 64 * kv_bytes_per_token(config, name)


def test_a_window_is_within_the_distances_that_the_model_knows() -> None:
    model = tiny().config
    wide = {"kv_policy": "streaming", "prefix_cache": "off", "kv_sinks": 4, "kv_window": model.max_context - 3, "kv_blocks": 99}
    with pytest.raises(InputError, match=f"--kv-window {model.max_context - 4} or less, or with --context {model.max_context}"):
        settle(EngineConfig(**wide), model, None)
    settle(EngineConfig(**{**wide, "kv_window": model.max_context - 4}), model, None)
    settle(EngineConfig(**wide, context=model.max_context), model, None)


def test_quest_has_a_layer_to_choose_in() -> None:
    model = tiny().config
    with pytest.raises(InputError, match="all would read everything"):
        settle(EngineConfig(kv_policy="quest", kv_dense_layers=model.num_layers, kv_blocks=9), model, None)
    settle(EngineConfig(kv_policy="quest", kv_dense_layers=model.num_layers - 1, kv_blocks=9), model, None)
