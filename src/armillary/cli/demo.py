"""`armillary demo`: sixteen chats at once with a real model, seen live, measured, reported; a small model pre-trained; both served."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import ConfigFile, EngineFlags, Json, ServerFlags, save_config, settle

if TYPE_CHECKING:
    from armillary.cli.launch import Running
    from armillary.core.config import Resolved
    from armillary.core.trace import Trace
    from armillary.serve.http.server import Server
    from armillary.serve.latency import Latencies, RequestTiming
    from armillary.serve.request import Request
    from armillary.web.report import Metric

_DEFAULTS = {"engine.kv_memory": 512_000_000, "engine.max_batch_tokens": 256}
"""A pool that sixteen chats fill visibly, and a budget that makes long prompts come in chunks."""


def demo(
    model: Annotated[str | None, Parameter(help="A name (smollm2), a .gguf file or a model folder.")] = None,
    /,
    *,
    once: Annotated[bool, Parameter(negative=(), help="Exit after the reports instead of serving the chat pages.")] = False,
    train_seconds: Annotated[
        float | None,
        Parameter(show_default=False, help="How long to pre-train a small model; 0 trains none (default: 120, with --once 20)."),
    ] = None,
    runs: Annotated[Path, Parameter(help="Where the run's folder goes.")] = Path("runs"),
    config: ConfigFile = None,
    json: Json = False,
    server: ServerFlags = ServerFlags(),  # noqa: B008 (frozen)
    engine: EngineFlags = EngineFlags(),  # noqa: B008
) -> None:
    """Serve 16 chats at once with a real model, pre-train a small one on Shakespeare, and keep both models' chat pages open.

    Each half leaves a folder named after the time under --runs: report.html, trace.json, config.toml and, of the training, the model.
    --json implies --once and trains nothing.
    """
    from armillary.cli.launch import launch
    from armillary.cli.serve import refuse_open_door
    from armillary.cli.terminal import print_json
    from armillary.core.run_folder import check_runs
    from armillary.core.trace import Trace

    settled = settle(model, engine, server, config, _own_defaults(engine))
    refuse_open_door(settled.value.server)
    check_runs(runs)
    trace = Trace("armillary demo")
    running = launch(settled, trace)
    requests, listeners = _submit(running)
    running.engine.start()
    try:
        _watch(running, requests)
        timings, latencies = _measure(requests, listeners)
        metrics = _metrics(running, latencies, trace)
        folder = _write(runs, running, settled, trace, metrics, timings)
        if json:
            print_json(
                {
                    "model": running.loaded.name,
                    "metrics": [{"name": m.name, "value": m.value, "meaning": m.meaning} for m in metrics],
                    "raw": _raw(running, latencies, trace),
                    "run": str(folder),
                }
            )
            return
        _print(requests, listeners, metrics, folder)
        trained = _train(runs, (20.0 if once else 120.0) if train_seconds is None else train_seconds)
        if not once:
            _keep_serving(running, settled, trained)
    finally:
        running.engine.stop()


def _own_defaults(engine: EngineFlags) -> dict[str, Any]:
    """The demo's defaults; a pool given in blocks leaves none for its memory."""
    return {key: value for key, value in _DEFAULTS.items() if key != "engine.kv_memory" or engine.kv_blocks is None}


def _submit(running: Running) -> tuple[list[Request], list[Any]]:
    """All sixteen, queued before the engine's thread starts, so that they arrive at once."""
    from armillary.cli.demo_prompts import PROMPTS
    from armillary.serve.latency import TokenTimes
    from armillary.serve.request import Request, SamplingParams
    from armillary.serve.text import TextStream

    requests, listeners = [], []
    for index, (words, most) in enumerate(PROMPTS, start=1):
        prompt = running.service.chat_tokens([{"role": "user", "content": words}])
        listener = TokenTimes()
        text = TextStream(running.loaded.tokenizer)
        sampling = SamplingParams(max_tokens=most, temperature=0)
        requests.append(Request(f"chat {index:02d}", prompt, sampling, text=text, on_event=listener))
        listeners.append(listener)
    for request in requests:
        running.engine.submit(request)
    return requests, listeners


def _watch(running: Running, requests: Sequence[Request]) -> None:
    """Show the engine at work until every request has ended. On stderr, so that stdout holds the result alone."""
    import sys

    from armillary.cli.terminal import note

    if sys.stderr.isatty():
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), refresh_per_second=8, transient=True) as live:
            while not _ended(requests):
                live.update(_picture(running, requests))
                time.sleep(0.12)
        return
    last = 0.0
    while not _ended(requests):
        if time.monotonic() - last >= 2:
            last = time.monotonic()
            state = running.engine.snapshot()
            tokens = sum(len(request.output) for request in requests)
            most = sum(request.sampling.max_tokens for request in requests)
            done = sum(request.finished is not None for request in requests)
            note(
                f"iteration {state['iteration']:,}: {state['running']} running, {state['waiting']} waiting, {done} done; "
                f"{tokens:,} tokens of at most {most:,}; {state['blocks']['used']:,} of {state['blocks']['total']:,} KV blocks"
            )
        time.sleep(0.05)


def _ended(requests: Sequence[Request]) -> bool:
    return all(request.finished is not None for request in requests)


def _picture(running: Running, requests: Sequence[Request]) -> Any:
    """A row a request: what it does and how far it is."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    state = running.engine.snapshot()
    phases = {row["id"]: row["phase"] for row in state["requests"]}
    colours = {"queued": "bright_black", "prompt": "yellow", "decode": "cyan", "recompute": "yellow", "preempted": "red", "done": "green"}
    blocks = state["blocks"]
    drawn = Table(
        title=f"iteration {state['iteration']:,}   KV blocks {blocks['used']:,} of {blocks['total']:,}   policy {state['policy']}",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for column, justify in (("request", "left"), ("prompt", "right"), ("", "left"), ("answer", "right"), ("state", "left")):
        drawn.add_column(column, justify=justify)  # type: ignore[arg-type]
    for request in requests:
        phase = "done" if request.finished is not None else phases.get(request.id, "queued")
        prompt = min(request.computed, len(request.prompt)) if phase != "done" else len(request.prompt)
        bar = Text("━" * round(8 * prompt / len(request.prompt)), style="yellow")
        bar.append(
            "━" * round(24 * len(request.output) / request.sampling.max_tokens), style=colours["done" if phase == "done" else "decode"]
        )
        bar.append((" " if phase == "done" else "─") * (32 - len(bar)), style="bright_black")
        drawn.add_row(request.id, f"{len(request.prompt)}", bar, f"{len(request.output)}", Text(phase, style=colours.get(phase, "")))
    return drawn


def _measure(requests: Sequence[Request], listeners: Sequence[Any]) -> tuple[list[RequestTiming], Latencies]:
    from armillary.core.errors import ArmillaryError
    from armillary.serve.latency import Latencies, RequestTiming

    failed = [request for request in requests if request.finish_reason not in ("stop", "length")]
    if failed:
        raise ArmillaryError(f"{len(failed)} of {len(requests)} requests ended with '{failed[0].finish_reason}'", "see the log above")
    timings = [RequestTiming.of(request, listener.times) for request, listener in zip(requests, listeners, strict=True)]
    return timings, Latencies.of(timings)


def _raw(running: Running, latencies: Latencies, trace: Trace) -> dict[str, Any]:
    """The table's values as plain numbers: durations in ns, throughputs in tokens/s, sizes in bytes."""
    from armillary.core.units import S

    limits, stats = running.engine.limits, running.engine.stats
    peak = int(max((sample.values["used"] for sample in trace.counters() if sample.track == "kv_blocks"), default=0))
    return {
        "requests": latencies.requests,
        "duration_ns": latencies.duration,
        "time_to_first_token_p50_ns": latencies.first_token(50),
        "time_to_first_token_p99_ns": latencies.first_token(99),
        "time_between_tokens_p50_ns": latencies.gap(50),
        "time_between_tokens_p99_ns": latencies.gap(99),
        "output_tokens": latencies.output_tokens,
        "output_tokens_per_second": latencies.throughput,
        "prompt_tokens": latencies.prompt_tokens,
        "tokens_per_second": (latencies.prompt_tokens + latencies.output_tokens) * S / max(1, latencies.duration),
        "kv_blocks_peak": peak,
        "kv_blocks_total": limits.total_blocks,
        "kv_bytes_peak": peak * running.forward.cache_bytes // limits.total_blocks,
        "iterations": stats.iterations,
        "preemptions": stats.preemptions,
    }


def _metrics(running: Running, latencies: Latencies, trace: Trace) -> list[Metric]:
    """The table: what, how much, and what it means."""
    from armillary.core.units import format_bytes, format_duration
    from armillary.web.report import Metric

    raw = _raw(running, latencies, trace)

    def time_of(name: str) -> str:
        return format_duration(raw[name]) if raw[name] is not None else "none"

    share = raw["kv_blocks_peak"] / raw["kv_blocks_total"]
    return [
        Metric("requests", f"{raw['requests']}", f"served at once, in {time_of('duration_ns')} from the first arrival to the last token"),
        Metric("time to first token, p50", time_of("time_to_first_token_p50_ns"), "from arrival until an answer begins: half begin sooner"),
        Metric("time to first token, p99", time_of("time_to_first_token_p99_ns"), f"the slowest of {raw['requests']}: all arrived at once"),
        Metric(
            "time between tokens, p50", time_of("time_between_tokens_p50_ns"), "how steadily an answer grows while it shares the machine"
        ),
        Metric("time between tokens, p99", time_of("time_between_tokens_p99_ns"), "the stalls: iterations shared with others' prompts"),
        Metric(
            "answer throughput",
            f"{raw['output_tokens_per_second']:.1f} tok/s",
            f"{raw['output_tokens']:,} tokens written, all answers together",
        ),
        Metric(
            "total throughput",
            f"{raw['tokens_per_second']:.1f} tok/s",
            f"with the {raw['prompt_tokens']:,} tokens of prompts that were read",
        ),
        Metric(
            "KV cache, peak",
            f"{share:.0%}",
            f"{raw['kv_blocks_peak']:,} of {raw['kv_blocks_total']:,} blocks held keys and values ({format_bytes(raw['kv_bytes_peak'])})",
        ),
        Metric("iterations", f"{raw['iterations']:,}", "passes through the model; each computes many requests' tokens"),
        Metric("preemptions", f"{raw['preemptions']:,}", "requests that lost their blocks to others and had to start over"),
    ]


def _write(
    runs: Path, running: Running, settled: Resolved[Any], trace: Trace, metrics: Sequence[Metric], timings: Sequence[RequestTiming]
) -> Path:
    """The run's folder: report.html, trace.json, config.toml."""
    from armillary import __version__
    from armillary.cluster.machine import describe
    from armillary.core.run_folder import new_run_folder
    from armillary.core.units import format_bytes
    from armillary.web.report import write_report

    now = datetime.now(UTC)
    folder = new_run_folder(runs, now)
    machine = describe()
    engine = running.engine
    facts = {
        "model": running.loaded.description,
        "computed by": running.computing,
        "KV pool": running.pool,
        "policy": f"{engine.policy.name}, at most {engine.limits.max_batch_tokens} tokens an iteration",
        "machine": f"{machine.cpu}, {machine.physical_cores} cores"
        + (f", {format_bytes(machine.memory_total)}" if machine.memory_total else "")
        + (f", {', '.join(gpu.name for gpu in machine.gpus)}" if machine.gpus else ", no GPU"),
        "software": f"armillary {__version__}, torch {machine.torch}, Python {machine.python}, {machine.system}",
        "time": now.strftime("%Y-%m-%d %H:%M:%S UTC"),
    }
    trace.meta |= facts
    trace.save(folder / "trace.json")
    save_config(settled, folder / "config.toml")
    write_report(
        trace,
        metrics,
        timings,
        folder / "report.html",
        title=f"{len(timings)} chats at once with {running.loaded.description.partition(':')[0]}",
        facts=facts,
        kv_blocks=engine.limits.total_blocks,
        config=(folder / "config.toml").read_text(encoding="utf-8"),
    )
    return folder


def _print(requests: Sequence[Request], listeners: Sequence[Any], metrics: Sequence[Metric], folder: Path) -> None:
    from armillary.cli.demo_prompts import PROMPTS
    from armillary.cli.terminal import table

    for index in (0, 10):
        print(f"{requests[index].id}: {PROMPTS[index][0]}\n  {' '.join(''.join(listeners[index].text).split())}\n")
    table(("", "", ""), [(metric.name, metric.value, metric.meaning) for metric in metrics])
    print(
        f"\nreport  {folder / 'report.html'}\ntrace   {folder / 'trace.json'} (opens in ui.perfetto.dev)\nconfig  {folder / 'config.toml'}",
        flush=True,
    )


def _train(runs: Path, seconds: float) -> Path | None:
    """Pre-train the small model and give its folder; None where that is not wanted, or its text cannot be had."""
    from armillary.cli import demo_train
    from armillary.cli.terminal import note
    from armillary.core.errors import ArmillaryError
    from armillary.train.session import MODEL

    if seconds <= 0:
        return None
    try:
        corpus = demo_train.prepare()
    except ArmillaryError as error:
        note(f"no small model is trained, for want of its text: {error}")
        return None
    print(f"\nNow a model from nothing: pre-training on Shakespeare for about {seconds:g} s (Ctrl-C ends it early).\n", flush=True)
    return demo_train.train_small(corpus, runs, seconds).folder / MODEL


def _keep_serving(running: Running, settled: Resolved[Any], trained: Path | None) -> None:
    """The chat pages, until Ctrl-C: the model's, and on the next port that of the model that was trained."""
    from armillary.cli.launch import launch
    from armillary.core.config import Resolved

    http = _listen(running, settled, 0)
    if trained is None:
        print(f"\nchat with it at {http.url} (OpenAI-compatible API at {http.url}/v1); Ctrl-C stops", flush=True)
        http.run()
        return
    value = settled.value
    small = value.model_copy(
        update={"model": str(trained), "engine": value.engine.model_copy(update={"kv_memory": 16_000_000, "kv_blocks": None})}
    )
    beside = launch(Resolved(small, settled.provenance))
    beside.engine.start()
    try:
        with _listen(beside, settled, 1) as second:
            print(
                f"\nchat with {running.loaded.name} at {http.url} (OpenAI-compatible API at {http.url}/v1)\n"
                f"and let the model that you have just trained go on where your text ends, at {second.url}; Ctrl-C stops both",
                flush=True,
            )
            http.run()
    finally:
        beside.engine.stop()


def _listen(running: Running, settled: Resolved[Any], offset: int) -> Server:
    """The server on the configured port plus `offset`. A port that nobody asked for gives way when it is taken."""
    from armillary.cli.serve import http_server
    from armillary.cli.terminal import note
    from armillary.core.errors import InputError

    server = settled.value.server
    port = server.port + offset if server.port else 0
    try:
        return http_server(running.service, server.model_copy(update={"port": port}))
    except InputError as error:
        if settled.provenance["server.port"] != "default" and not offset:
            raise
        note(f"{error.problem}; taking a free port instead")
        return http_server(running.service, server.model_copy(update={"port": 0}))
