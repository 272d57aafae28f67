"""From settled configuration to a running engine, saying what happens: what `serve`, `chat` and `demo` begin with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from armillary.cli.terminal import byte_progress, note, timed

if TYPE_CHECKING:
    from armillary.core.config import Resolved
    from armillary.core.trace import Trace
    from armillary.models.load import LoadedModel
    from armillary.serve.engine import Engine
    from armillary.serve.executors.forward import Forward
    from armillary.serve.executors.local import LocalExecutor
    from armillary.serve.service import Service
    from armillary.serve.surface import Serving


@dataclass(frozen=True, slots=True)
class Running:
    """A loaded model behind an engine or a fleet of them, which is not started yet."""

    loaded: LoadedModel
    engine: Serving
    service: Service  # tokens and requests from chats

    @property
    def forward(self) -> Forward:
        """Who computes the batches, in this process."""
        return cast("LocalExecutor", cast("Engine", self.engine).executor).forward

    @property
    def computing(self) -> str:
        """Who computes, in words."""
        from armillary.core.units import format_bytes

        return f"{self.forward.name}, weights {format_bytes(self.forward.weight_bytes)} in memory, {self.forward.prepared}"

    @property
    def pool(self) -> str:
        """The KV pool in words."""
        from armillary.core.units import format_bytes

        limits = self.engine.limits
        tokens = limits.total_blocks * limits.block_size
        return f"{format_bytes(self.forward.cache_bytes)}: {limits.total_blocks:,} blocks of {limits.block_size} tokens, {tokens:,} tokens in all"


def launch(settled: Resolved[Any], trace: Trace | None = None, *, replicas: bool = False) -> Running:
    """Fetch the model if need be, load it, build the engine; tells the reader each step on stderr.

    `replicas`: with as many of them as the configuration asks for, in processes of their own.
    """
    name = settled.value.model
    fleet = settled.value.fleet if replicas and not settled.value.fleet.alone else None
    check_fit(settled)
    with timed("loading PyTorch") as done:
        from armillary.models.load import load
        from armillary.serve.llm import build_engine
        from armillary.serve.service import Service

        done("loaded PyTorch")
    if settled.value.engine.backend != "torch" and settled.value.engine.offload is None and settled.value.engine.sparsity is None:
        with timed("loading the native kernels (a machine's first start builds them: half a minute)") as done:
            from armillary.kernels import cpu_library

            done("native kernels ready" if cpu_library.available() else "no native kernels: torch computes, slower")
    if fleet is not None:
        return _launch_fleet(settled, trace)
    with timed(f"loading {name}") as done:
        loaded = load(name)
        engine = build_engine(loaded, settled.value.engine, trace=trace)
        done(f"loaded {name}")
    running = Running(loaded, engine, Service(engine, loaded))
    note(loaded.description)
    note(f"computed by {running.computing}")
    note(f"KV cache {running.pool}; policy {settled.value.engine.scheduling}, at most {engine.limits.max_batch_tokens} tokens an iteration")
    if running.service.context < min(engine.config.context or loaded.config.max_context, loaded.config.max_context):
        note(f"a request has at most {running.service.context:,} tokens: to have more, {running.service.longer}")
    return running


def _launch_fleet(settled: Resolved[Any], trace: Trace | None) -> Running:
    """Everything but the replicas, which load the model themselves when the fleet is started."""
    from armillary.core.units import format_bytes
    from armillary.models.load import load
    from armillary.serve.fleet.build import build_fleet, cores
    from armillary.serve.kv_pool import kv_bytes_per_token
    from armillary.serve.service import Service

    value = settled.value
    loaded = load(value.model)
    fleet = build_fleet(loaded, value.engine, value.fleet, trace=trace)
    limits, roles = fleet.limits, value.fleet.roles
    note(loaded.description)
    pool = limits.total_blocks * limits.block_size * kv_bytes_per_token(loaded.config, fleet.config.kv_dtype)
    what = (
        f"{roles.count('prefill')} prefill and {roles.count('decode')} decode workers"
        if value.fleet.prefill_workers
        else f"{len(roles)} replicas"
    )
    note(
        f"{what}, each with {fleet.config.threads} threads and a KV cache of {format_bytes(pool)}: {limits.total_blocks:,} blocks of "
        f"{limits.block_size} tokens; policy {value.engine.scheduling}, router {value.fleet.router}"
    )
    if not value.fleet.ray and len(roles) > cores():
        note(f"{len(roles)} processes share {cores()} cores: they take turns, and a single one would be as fast")
    return Running(loaded, fleet, Service(fleet, loaded))


def start(running: Running) -> None:
    """Start the engine's thread, or the replicas: that takes as long as loading the model, and is told."""
    replicas = running.engine.snapshot()["features"].get("fleet", {}).get("replicas", ())
    if not replicas:
        running.engine.start()
        return
    with timed(f"starting {len(replicas)} replicas") as done:
        running.engine.start()
        done(f"started {len(replicas)} replicas")
    for words in sorted({replica["computing"] for replica in running.engine.snapshot()["features"]["fleet"]["replicas"]}):
        note(f"computed by {words}")


def check_fit(settled: Resolved[Any]) -> None:
    """Fetch the model if need be, visibly, and refuse a context, a pool or adapters that do not fit it or this machine: before torch is loaded."""
    from armillary.models import hub
    from armillary.models.config_file import read_config
    from armillary.models.lora_config import check_name, read_lora_config
    from armillary.serve.kv_pool import available_memory, settle

    with byte_progress(settled.value.model) as progress:
        path = hub.resolve(settled.value.model, progress=progress)
    config, engine = read_config(path), settled.value.engine
    settle(engine, config, available_memory())
    for name, folder in engine.lora.items():
        check_name(name)
        read_lora_config(folder, config, engine.lora_memory)
