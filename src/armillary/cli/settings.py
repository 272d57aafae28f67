"""The flags that several verbs share, and the configuration that flags, environment and a TOML file settle together."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter

if TYPE_CHECKING:
    from armillary.core.config import Resolved

_ENGINE = Group("Engine (also under engine in --config, ARMILLARY_ENGINE__NAME)", sort_key=2)
_FLEET = Group("Replicas (also under fleet in --config, ARMILLARY_FLEET__NAME)", sort_key=3)
_SERVER = Group("Server (also under server in --config, ARMILLARY_SERVER__NAME)", sort_key=1)


def _flag(text: str, group: Group) -> Parameter:
    return Parameter(help=text, group=group, show_default=False)


WORKLOAD = Group("Workload", sort_key=2)
Lengths = Annotated[
    str, Parameter(group=WORKLOAD, help="conversation, code, summarization (fitted to published traces), or PROMPT+ANSWER tokens.")
]
Variation = Annotated[
    float, Parameter(group=WORKLOAD, help="Coefficient of variation of the time between arrivals: 1 is Poisson, more is bursty.")
]
Acceptance = Annotated[
    str | None,
    Parameter(
        group=WORKLOAD,
        show_default=False,
        help="How often drafts (--speculate) are right, such as 0.7; or of the first, second, ... and all later ones of a pass, "
        "in a share of the passes: 0.6,0.8@0.5; behind a + after passes that were right: 0.6@0.4+0.95@0.9.",
    ),
]
PublishedModel = Annotated[
    str, Parameter(help="A published architecture (llama-2-7b, ...), a name of `armillary models`, a folder or a .gguf file.")
]
ConfigFile = Annotated[Path | None, Parameter(help="A TOML file: model = ..., [server], [engine]. Environment and flags win over it.")]
Json = Annotated[bool, Parameter(name="--json", negative=(), show_default=False, help="One JSON document on stdout, for machines.")]


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class EngineFlags:
    """`serve.config.EngineConfig` as flags; None was not given."""

    policy: Annotated[str | None, _flag("Who runs when: sarathi (default), vllm, orca, request-level.", _ENGINE)] = None
    order: Annotated[
        str | None,
        _flag(
            "Who is admitted first: fcfs (default), sjf (shortest job), deadline (earliest), priority (lowest number), prefix (most in the cache).",
            _ENGINE,
        ),
    ] = None
    max_wait: Annotated[
        str | None, _flag("Who has waited longer goes first, whatever the order, such as 90s; none for no bound (default 60s).", _ENGINE)
    ] = None
    victim: Annotated[
        str | None,
        _flag("Who is preempted when KV blocks run out: last (admitted; default) or cost (the least to compute again).", _ENGINE),
    ] = None
    tbt_target: Annotated[
        str | None,
        _flag("Bound of the time between tokens, such as 50ms: sarathi cuts prompts to it, within --max-batch-tokens.", _ENGINE),
    ] = None
    block_size: Annotated[int | None, _flag("Tokens a KV block (default 16).", _ENGINE)] = None
    kv_blocks: Annotated[int | None, _flag("KV blocks in the pool, instead of --kv-memory.", _ENGINE)] = None
    kv_memory: Annotated[
        str | None, _flag('Memory of the KV pool, such as "512 MiB" (default: a quarter of the free memory, at most 4 GB).', _ENGINE)
    ] = None
    max_batch_tokens: Annotated[int | None, _flag("Most tokens an iteration: the budget of chunked prefill (default 512).", _ENGINE)] = None
    max_running: Annotated[int | None, _flag("Most sequences in flight (default 64).", _ENGINE)] = None
    max_queue: Annotated[int | None, _flag("Most requests that may wait; more are refused (default 16384).", _ENGINE)] = None
    context: Annotated[int | None, _flag("Most tokens of one sequence, prompt and answer (default: the model's).", _ENGINE)] = None
    backend: Annotated[str | None, _flag("Who computes: auto (default), native (the CPU kernels) or torch.", _ENGINE)] = None
    quantize: Annotated[str | None, _flag("Weights in memory: none (default), fp16, int8 or int4; needs the native backend.", _ENGINE)] = (
        None
    )
    kv_dtype: Annotated[
        str | None,
        _flag("Keys and values in memory: fp32 (default), fp16, fp8 or int8; all but the first need the native backend.", _ENGINE),
    ] = None
    kv_policy: Annotated[
        str | None,
        _flag("What is kept of keys and values, and read: dense (default), streaming, h2o, quest, minference or infllm.", _ENGINE),
    ] = None
    kv_sinks: Annotated[int | None, _flag("First tokens that a bounded KV policy always keeps (default 4).", _ENGINE)] = None
    kv_window: Annotated[int | None, _flag("Last tokens that a bounded KV policy always keeps (default 1024).", _ENGINE)] = None
    kv_budget: Annotated[int | None, _flag("Tokens that a KV policy chooses to read, or to keep (default 1024).", _ENGINE)] = None
    kv_dense_layers: Annotated[int | None, _flag("First layers that read everything, with --kv-policy quest (default 0).", _ENGINE)] = None
    kv_patterns: Annotated[str | None, _flag("File of each head's attention pattern, with --kv-policy minference.", _ENGINE)] = None
    prefix_cache: Annotated[str | None, _flag("Reuse what prompts that begin alike share: on (default) or off.", _ENGINE)] = None
    weight_cache: Annotated[str | None, _flag("Keep laid-out weights on disk for the next start: on (default) or off.", _ENGINE)] = None
    deterministic: Annotated[
        bool | None,
        Parameter(
            negative=(),
            group=_ENGINE,
            show_default=False,
            help="An answer depends on its prompt, parameters and seed alone, never on its company; needs the native backend.",
        ),
    ] = None
    async_scheduling: Annotated[
        str | None, _flag("Make the next batch while the current one is computed: on or off (default).", _ENGINE)
    ] = None
    speculate: Annotated[
        str | None,
        _flag(
            "Verify several proposed tokens at once: off (default), ngram (earlier text), layers (some of the model's) or model.", _ENGINE
        ),
    ] = None
    draft_model: Annotated[str | None, _flag("The model that proposes, with --speculate model.", _ENGINE)] = None
    draft_tokens: Annotated[int | None, _flag("Most tokens proposed at a time (default 8); fewer where more do not pay.", _ENGINE)] = None
    draft_layers: Annotated[float | None, _flag("Share of the layers that propose, with --speculate layers (default 0.5).", _ENGINE)] = None
    offload: Annotated[
        str | None,
        _flag(
            "A model larger than the accelerator: auto, or percentages of weights, KV cache and activations in its memory, in RAM and on disk, "
            'such as "weights=20/80/0,cache=0/100/0,hidden=0/100/0,batches=3".',
            _ENGINE,
        ),
    ] = None
    offload_memory: Annotated[
        str | None,
        _flag('Memory of the accelerator (stood for by part of this machine\'s), such as "2GB" (default: what --offload needs).', _ENGINE),
    ] = None
    offload_compress: Annotated[
        str | None, _flag("Offloaded matrices, keys and values in 4 bits, in groups of 64: none (default) or int4.", _ENGINE)
    ] = None
    offload_folder: Annotated[str | None, _flag("Folder of the disk tier's files (default: the cache folder).", _ENGINE)] = None
    tool_format: Annotated[
        str | None, _flag("How the model writes tool calls: auto (default), hermes, tagged-list, granite, llama-json or pythonic.", _ENGINE)
    ] = None
    sparsity: Annotated[
        str | None, _flag("A file of predictors: single tokens compute only the neurons that it names (contextual sparsity).", _ENGINE)
    ] = None
    sparsity_share: Annotated[
        float | None, _flag("Share of a layer's neurons that they name (default: all that are likelier active than not).", _ENGINE)
    ] = None
    lora: Annotated[
        tuple[str, ...] | None,
        Parameter(
            negative=(),
            group=_ENGINE,
            show_default=False,
            help="NAME=PATH of a peft folder: its adapter is served under that name; may be given more than once.",
        ),
    ] = None
    max_loras: Annotated[int | None, _flag("Most adapters in memory; others are read when they are asked for (default 16).", _ENGINE)] = (
        None
    )
    lora_memory: Annotated[str | None, _flag('Most memory of adapters, such as "512 MiB" (default 1 GB).', _ENGINE)] = None
    threads: Annotated[int | None, _flag("Threads of the executor (default: one a core).", _ENGINE)] = None
    seed: Annotated[int | None, _flag("Seed of the requests that bring none (default 0).", _ENGINE)] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class ServerFlags:
    """`ServerConfig` as flags; None was not given."""

    host: Annotated[str | None, _flag("Address to listen on (default 127.0.0.1: this machine only).", _SERVER)] = None
    port: Annotated[int | None, _flag("Port to listen on; 0 takes a free one (default 8000).", _SERVER)] = None
    api_key: Annotated[
        tuple[str, ...] | None,
        Parameter(
            negative=(),
            group=_SERVER,
            show_default=False,
            help="Key that clients must send as a bearer token (safer in the environment); may be given more than once.",
        ),
    ] = None
    keys: Annotated[Path | None, _flag("TOML file of keys by name, each with its limits a minute (docs/http.md).", _SERVER)] = None
    allow_public: Annotated[
        bool | None, Parameter(negative=(), group=_SERVER, show_default=False, help="Listen on other addresses without a key.")
    ] = None
    drain_seconds: Annotated[float | None, _flag("How long SIGTERM lets answers in flight go on (default 30).", _SERVER)] = None
    shed_after: Annotated[
        float | None, _flag("Seconds that a request may be expected to wait; more is refused with 429 (default: any).", _SERVER)
    ] = None
    max_queued_kv: Annotated[
        float | None, _flag("KV pools' worth of requests that may wait; more are refused with 429 (default 64).", _SERVER)
    ] = None
    access_log: Annotated[str | None, _flag("File that gets one JSON line an HTTP request, or - for stdout.", _SERVER)] = None
    allow_debug: Annotated[
        bool | None, Parameter(negative=(), group=_SERVER, show_default=False, help="Answer /debug/trace?seconds=5 with a Perfetto trace.")
    ] = None
    files: Annotated[Path | None, _flag("Folder that keeps uploaded files and batches over a restart (default: in memory).", _SERVER)] = (
        None
    )
    files_limit: Annotated[str | None, _flag('All uploaded files and results of batches (default "64 MiB").', _SERVER)] = None
    allow_lora_loading: Annotated[
        Path | None, _flag("Directory whose peft folders clients may load and unload over HTTP (default: none).", _SERVER)
    ] = None
    otel: Annotated[
        str | None, _flag("Send OpenTelemetry spans there, such as http://localhost:4318/v1/traces (extra: otel).", _SERVER)
    ] = None
    simulations: Annotated[
        int | None, _flag("Simulations that may run at a time for the page, each a process; 0: none (default 2).", _SERVER)
    ] = None
    explain: Annotated[
        bool | None,
        Parameter(negative=(), group=_SERVER, show_default=False, help="Tell of every request that ends why it took as long as it did."),
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True)
class FleetFlags:
    """`serve.fleet.config.FleetConfig` as flags; None was not given."""

    replicas: Annotated[
        int | None, _flag("Engines behind the API, each a process; they divide --threads and --kv-memory (default 1).", _FLEET)
    ] = None
    prefill_workers: Annotated[int | None, _flag("Processes that compute prompts only; needs --decode-workers.", _FLEET)] = None
    decode_workers: Annotated[int | None, _flag("Processes that generate only; needs --prefill-workers.", _FLEET)] = None
    router: Annotated[
        str | None,
        _flag("Who gets a request: cache-aware (default), power-of-two, shortest-queue, round-robin, consistent-hash.", _FLEET),
    ] = None
    tail: Annotated[
        str | None, _flag("A second copy of a request: none (default), hedged (when it is late) or tied (in two queues, one runs).", _FLEET)
    ] = None
    hedge_budget: Annotated[float | None, _flag("Share of prompt tokens that hedging may compute twice (default 0.05).", _FLEET)] = None
    silence: Annotated[
        float | None, _flag("Seconds without a sign of life after which a replica's requests go elsewhere (default 3).", _FLEET)
    ] = None
    transfer_memory: Annotated[
        str | None, _flag("Memory of a prefill worker for prompts that wait for a decode worker (default 1 GB).", _FLEET)
    ] = None
    transfer: Annotated[
        str | None,
        _flag("How keys and values get to decode workers: memory (default, this machine's) or network (torch.distributed).", _FLEET),
    ] = None
    ray: Annotated[
        bool | None,
        Parameter(
            negative=(), group=_FLEET, show_default=False, help="Replicas are Ray actors; each gets all of --threads and --kv-memory."
        ),
    ] = None


def settle(
    model: str | None = None,
    engine: EngineFlags | None = None,
    server: ServerFlags | None = None,
    file: Path | None = None,
    defaults: dict[str, Any] | None = None,
    fleet: FleetFlags | None = None,
) -> Resolved[Any]:
    """Default < file < environment < flag, as a `RunConfig` with the provenance of every key.

    `defaults` are the verb's own, by dotted key: they lose to every other source. Raises InputError, NotFoundError or FormatError.
    """
    from armillary.cli.run_config import RunConfig
    from armillary.core.config import Resolved, resolve

    flags: dict[str, Any] = {"model": model}
    flags |= {f"engine.{name}": value for name, value in asdict(engine or EngineFlags()).items()}
    flags |= {f"server.{name}": value for name, value in asdict(server or ServerFlags()).items()}
    flags |= {f"fleet.{name}": value for name, value in asdict(fleet or FleetFlags()).items()}
    settled = resolve(RunConfig, file=file, flags=flags)
    own = {key: value for key, value in (defaults or {}).items() if settled.provenance[key] == "default"}
    if not own:
        return settled
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they were given the first time
        again = resolve(RunConfig, file=file, flags={**flags, **own})
    return Resolved(again.value, {**again.provenance, **dict.fromkeys(own, "default of this verb")})


def save_config(settled: Resolved[Any], path: Path) -> None:
    """Write the configuration with the provenance of every value; a key for clients stays out of the file."""
    from armillary.core.config import Resolved

    value = settled.value
    if value.server.api_key is not None:
        value = value.model_copy(update={"server": value.server.model_copy(update={"api_key": None})})
    Resolved(value, settled.provenance).save(path)
