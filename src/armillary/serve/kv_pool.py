"""How large the KV pool is and how long a sequence may be, settled for a model and a machine. Without torch: it is asked before torch is loaded."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

from armillary.cluster.cgroup import cgroup_limits
from armillary.core.errors import CapacityError, InputError
from armillary.core.units import format_bytes
from armillary.models.config import ModelConfig
from armillary.serve.config import EngineConfig

POOL_SHARE: Final = 4  # the default pool takes one part in four of the free memory ...
ENDLESS: Final = 1 << 30  # tokens of a stream: positions are 32-bit numbers
POOL_LIMIT: Final = 4 * 10**9  # ... and at most this many bytes

KvDtype = Literal["fp32", "fp16", "fp8", "int8"]
_BYTES: Final[dict[KvDtype, int]] = {"fp32": 4, "fp16": 2, "fp8": 1, "int8": 1}


def kv_bytes_per_token(model: ModelConfig, dtype: KvDtype = "fp32") -> int:
    """Bytes of keys and values that one token holds in the cache over all layers; int8 has an fp32 scale for each head beside them."""
    row = model.head_dim * _BYTES[dtype] + (4 if dtype == "int8" else 0)
    return 2 * model.num_layers * model.num_kv_heads * row


def held_per_token(config: EngineConfig, model: ModelConfig) -> int:
    """Bytes that one token holds in the cache, with what the KV policy keeps beside it."""
    return kv_bytes_per_token(model, config.kv_dtype) + model.num_layers * model.num_kv_heads * config.kv.beside(model.head_dim)


def kv_capacity(model: ModelConfig, size: int, block_size: int, dtype: KvDtype = "fp32") -> int:
    """How many KV blocks of `block_size` tokens fit `size` bytes. Raises InputError when none does."""
    block = block_size * kv_bytes_per_token(model, dtype)
    if size < block:
        raise InputError(
            f"{size:,} bytes do not hold one KV block of {block_size} tokens ({block:,} bytes)",
            "give more memory or a smaller block_size",
            field="kv_memory",
        )
    return size // block


def settle(config: EngineConfig, model: ModelConfig, memory: int | None, draft_bytes: int = 0) -> EngineConfig:
    """`config` with `kv_blocks` and `context` decided for this model and `memory` free bytes (None: unknown).

    `draft_bytes`: what a token takes in the pool of a draft model, which has as many blocks.

    By default the pool takes a quarter of the free memory, at most 4 GB, and no more than `max_running` sequences of full
    context could fill.
    """
    context = config.context if config.context is not None else ENDLESS if config.kv.unbounded else model.max_context
    if context > model.max_context and not config.kv.unbounded:
        raise InputError(
            f"context {context:,} is more than the {model.max_context:,} tokens that the model was made for",
            f"serve with --context {model.max_context} or less",
            field="context",
        )
    _within(config, model, context)
    per_token = held_per_token(config, model) + draft_bytes
    if config.kv_blocks is None and config.kv_memory is None:
        each = -(-context // config.block_size)
        most = config.max_running * (each if config.kv.most_blocks is None else min(each, config.kv.most_blocks))
        size = POOL_LIMIT if memory is None else min(POOL_LIMIT, memory // POOL_SHARE)
        least = config.block_size * per_token
        config = config.model_copy(
            update={"kv_blocks": min(most, kv_capacity(model, max(size, least), config.block_size, config.kv_dtype))}
        )
    config = config.with_pool(per_token).model_copy(update={"context": context})
    assert config.kv_blocks is not None
    needed = config.kv_blocks * config.block_size * per_token
    if memory is not None and needed > memory:
        raise CapacityError(
            f"the KV pool would take {format_bytes(needed)}; {format_bytes(memory)} of memory are free",
            "give a smaller kv_blocks or kv_memory",
            field="kv_blocks",
        )
    return config


def _within(config: EngineConfig, model: ModelConfig, context: int) -> None:
    """Raises InputError for a KV policy's numbers that this model cannot be served with."""
    before = config.kv_sinks if config.kv_policy == "streaming" else 0  # of infllm all that is far stands where the window ends
    if context > model.max_context and before + config.kv_window > model.max_context:
        raise InputError(
            f"kv_policy {config.kv_policy} reads {before + config.kv_window:,} tokens at their distances, and the model was made for {model.max_context:,}",
            f"serve with --kv-window {max(1, model.max_context - before)} or less, or with --context {model.max_context}",
            field="kv_window",
        )
    if config.kv_policy == "quest" and config.kv_dense_layers >= model.num_layers:
        raise InputError(
            f"kv_dense_layers is {config.kv_dense_layers}, and the model has {model.num_layers} layers: all would read everything",
            "give fewer, or leave kv_policy quest out",
            field="kv_dense_layers",
        )


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes that can be taken without swapping and within the container's limit; None where the system does not say."""
    limit = cgroup_limits(root).memory
    left = None if limit is None else max(0, limit - _resident(root))
    return min((size for size in (_available(root), left) if size is not None), default=None)


def _available(root: Path) -> int | None:
    with suppress(OSError, ValueError, IndexError):
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    with suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _resident(root: Path) -> int:
    """Bytes that this process holds already; 0 where the system does not say."""
    with suppress(AttributeError, OSError, ValueError, IndexError):
        return int((root / "proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
