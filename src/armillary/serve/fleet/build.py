"""From a model and what a fleet may be told to a fleet: threads and KV memory divided before anything is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from armillary.core.errors import InputError
from armillary.models.config import ModelConfig
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.fleet.fleet import Blueprint, Fleet
from armillary.serve.fleet.worker import FROM_MODEL
from armillary.serve.kv_pool import available_memory, held_per_token, settle
from armillary.serve.speculation.build import draft_bytes_per_token, load_draft

if TYPE_CHECKING:
    from armillary.core.trace import Trace
    from armillary.models.load import LoadedModel


def share(
    config: EngineConfig, model: ModelConfig, fleet: FleetConfig, memory: int | None, cores: int, draft_bytes: int = 0
) -> EngineConfig:
    """What each replica gets of `config`'s threads, KV pool and accelerator, which are the whole fleet's; with Ray, each gets all of them.

    `draft_bytes`: what a token takes in a draft model's pool.

    Raises as `kv_pool.settle`, and InputError when a replica is left without a KV block.
    """
    if fleet.prefill_workers and not config.kv.positional:
        raise InputError(
            f"prefill workers hand over all blocks of a prompt, and kv_policy {config.kv_policy} gives back those of its middle",
            "serve with replicas instead, or another --kv-policy",
            field="kv_policy",
        )
    count = 1 if fleet.ray else len(fleet.roles)
    whole = settle(config.model_copy(update={"max_running": min(1 << 16, count * config.max_running)}), model, memory, draft_bytes)
    assert whole.kv_blocks is not None
    if whole.kv_blocks < count:
        raise InputError(
            f"{whole.kv_blocks} KV blocks are not one for each of {count} replicas",
            "give more memory, or fewer replicas",
            field="kv_blocks",
        )
    threads = config.threads if config.threads is not None else cores
    parts: dict[str, int] = {"kv_blocks": whole.kv_blocks // count, "threads": max(1, threads // count)}
    if config.offload_memory is not None:
        parts["offload_memory"] = config.offload_memory // count
    adapters = {name: str(Path(path).absolute()) for name, path in config.lora.items()}  # a replica may start elsewhere
    return whole.model_copy(update={**parts, "max_running": config.max_running, "lora": adapters})


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def build_fleet(loaded: LoadedModel, config: EngineConfig, fleet: FleetConfig, *, trace: Trace | None = None) -> Fleet:
    """A fleet that serves `loaded`, each replica reading the model from its files; not started yet."""
    drafting = draft_bytes_per_token(config, loaded, load_draft(config, loaded))
    each = share(config, loaded.config, fleet, available_memory(), cores(), drafting)
    launcher = None
    if fleet.ray:
        from armillary.serve.fleet.ray import RayLauncher

        assert each.threads is not None
        launcher = RayLauncher(len(fleet.roles), each.threads)
    return Fleet(
        # Replicas are given their adapters when they have been built: those of then, not of now.
        Blueprint(FROM_MODEL, {"model": str(loaded.source_path), "engine": {**each.model_dump(mode="json"), "lora": {}}}),
        each,
        fleet,
        eos_ids=loaded.tokenizer.stop_ids,
        token_bytes=held_per_token(each, loaded.config),
        launcher=launcher,
        trace=trace,
    )
