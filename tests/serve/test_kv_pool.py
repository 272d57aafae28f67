"""What a request for memory asks too much of is known before torch is loaded. The arithmetic of the pool: test_llm, test_local."""

import subprocess
import sys

from models import tiny

from armillary.kernels.cpu_step import StepCache
from armillary.serve.kv_pool import kv_bytes_per_token
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
