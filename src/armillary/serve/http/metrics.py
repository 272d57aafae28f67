"""`GET /metrics`: what the server did, for Prometheus, under our names and under those that vLLM's dashboards query."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from armillary.serve.http.exchange import Exchange
from armillary.serve.http.fleet_metrics import fleet_metrics
from armillary.serve.request import Event, Request

if TYPE_CHECKING:
    from armillary.serve.service import Service

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)

LARGEST_ITERATION = 15  # as a power of two: the last finite bucket of iteration tokens is 16,384

# Ours -> vLLM's. Histograms and counters alike; Prometheus appends `_total` to counters.
VLLM_NAMES = {
    "armillary_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "armillary_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "armillary_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "armillary_request_queue_seconds": "vllm:request_queue_time_seconds",
    "armillary_request_prefill_seconds": "vllm:request_prefill_time_seconds",
    "armillary_request_decode_seconds": "vllm:request_decode_time_seconds",
    "armillary_request_prompt_tokens": "vllm:request_prompt_tokens",
    "armillary_request_generated_tokens": "vllm:request_generation_tokens",
    "armillary_iteration_tokens": "vllm:iteration_tokens_total",
    "armillary_cache_config_info": "vllm:cache_config_info",
    "armillary_prompt_tokens": "vllm:prompt_tokens",
    "armillary_generated_tokens": "vllm:generation_tokens",
    "armillary_preemptions": "vllm:num_preemptions",
    "armillary_prefix_cache_queries": "vllm:prefix_cache_queries",
    "armillary_prefix_cache_hits": "vllm:prefix_cache_hits",
    "armillary_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "armillary_accepted_draft_tokens": "vllm:spec_decode_num_accepted_tokens",
    "armillary_requests_finished": "vllm:request_success",
    "armillary_requests_running": "vllm:num_requests_running",
    "armillary_requests_waiting": "vllm:num_requests_waiting",
    "armillary_kv_cache_usage_ratio": "vllm:kv_cache_usage_perc",
}


class Metrics:
    """Observes a service's requests; `render` is the text that Prometheus reads.

    Time to first token counts from the arrival of the HTTP request, before its body is read and tokenised.
    `vllm_names`: write every metric a second time under vLLM's name.
    """

    def __init__(self, service: Service, *, vllm_names: bool = True) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        own = CollectorRegistry(auto_describe=False)

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(f"armillary_{name}", documentation, ["model_name"], buckets=buckets, registry=own)
            return family.labels(service.model_name)

        self._first_token = histogram("time_to_first_token_seconds", "From arrival at the server to the first token", SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between two tokens of one request", SECONDS)
        self._latency = histogram("request_latency_seconds", "From arrival at the server to the last token", SECONDS)
        self._queue = histogram("request_queue_seconds", "From arrival to the first iteration that the request is part of", SECONDS)
        self._prefill = histogram("request_prefill_seconds", "From the first iteration to the first token", SECONDS)
        self._decode = histogram("request_decode_seconds", "From the first token to the last", SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a finished request", TOKENS)
        self._generated = histogram("request_generated_tokens", "Generated tokens of a finished request", TOKENS)
        self._answers = Counter(
            "armillary_http_answers",
            "HTTP requests that ended, by status; none: the client went first",
            ["model_name", "status"],
            registry=own,
        )
        self._model = service.model_name
        self._last: dict[Request, int] = {}  # when each unfinished request's latest token came
        own.register(_EngineState(service))
        self._registry.register(_Both(own, vllm_names))

    def answered(self, exchange: Exchange) -> None:
        """An HTTP request is over."""
        self._answers.labels(self._model, str(exchange.status or "none")).inc()

    def submitted(self, request: Request) -> None: ...

    def event(self, request: Request, event: Event) -> None:
        if event.token is not None:
            last = self._last.get(request)
            if last is None:
                self._first_token.observe((event.at - (request.arrival or event.at)) / 1e9)
            else:
                self._between.observe((event.at - last) / 1e9)
            self._last[request] = event.at
        if event.finish_reason is not None:
            self._last.pop(request, None)
            if event.finish_reason in ("stop", "length"):
                self._finished(request, event.at)

    def _finished(self, request: Request, at: int) -> None:
        arrival = request.arrival if request.arrival is not None else at
        self._latency.observe((at - arrival) / 1e9)
        self._prompt.observe(len(request.prompt))
        self._generated.observe(len(request.output))
        if request.first_scheduled is not None:
            self._queue.observe((request.first_scheduled - arrival) / 1e9)
            if request.first_token is not None:
                self._prefill.observe((request.first_token - request.first_scheduled) / 1e9)
                self._decode.observe((at - request.first_token) / 1e9)

    def render(self) -> bytes:
        return generate_latest(self._registry)


class _EngineState(Collector):
    """Gauges and counters that the engine keeps itself, read at the moment of the scrape."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        engine, model = self._service.engine, self._service.model_name
        live = engine.snapshot(since=engine.stats.iterations)
        stats, used = live["stats"], live["blocks"]["used"]
        for name, help_text, value in (
            ("requests_running", "Requests in the running batch", live["running"]),
            ("requests_waiting", "Requests in the queue", live["waiting"]),
            ("kv_blocks_used", "KV blocks in use", used),
            ("kv_blocks_kept", "KV blocks without a user, kept for sequences that begin alike", live["blocks"]["kept"]),
            ("kv_blocks", "KV blocks in the pool", live["blocks"]["total"]),
            ("kv_cache_usage_ratio", "Share of the KV pool in use, 0 to 1", used / live["blocks"]["total"]),
        ):
            gauge = GaugeMetricFamily(f"armillary_{name}", help_text, labels=["model_name"])
            gauge.add_metric([model], value)
            yield gauge
        for name, help_text, value in (
            ("iterations", "Iterations of the engine", stats["iterations"]),
            ("iterations_failed", "Iterations that raised", stats["failed_iterations"]),
            ("prompt_tokens", "Tokens of prompts, computed or reused", stats["prompt_tokens"]),
            ("prefix_cache_queries", "Tokens of sequences that were admitted and looked for in the prefix cache", stats["sought_tokens"]),
            ("prefix_cache_hits", "Tokens of them that it had", stats["reused_tokens"]),
            ("generated_tokens", "Tokens generated", stats["generated_tokens"]),
            ("draft_tokens", "Tokens that were proposed and verified", stats["drafted_tokens"]),
            ("accepted_draft_tokens", "Tokens of them that were right", stats["accepted_tokens"]),
            ("preemptions", "Times that a running request lost its KV blocks", stats["preemptions"]),
            (
                "recomputed_tokens",
                "Cached tokens that preemption took away; prefix_cache_hits has those found again",
                stats["recomputed_tokens"],
            ),
        ):
            counter = CounterMetricFamily(f"armillary_{name}", help_text, labels=["model_name"])
            counter.add_metric([model], value)
            yield counter
        sizes, below, buckets = stats["iteration_sizes"], 0, []
        for power, count in enumerate(sizes[:LARGEST_ITERATION]):
            below += count
            buckets.append((str(float(2**power)), below))
        buckets.append(("+Inf", sum(sizes)))
        iteration = HistogramMetricFamily("armillary_iteration_tokens", "Tokens computed in an iteration", labels=["model_name"])
        iteration.add_metric([model], buckets, stats["scheduled_tokens"])
        yield iteration
        config = {"block_size": engine.limits.block_size, "num_blocks": engine.limits.total_blocks, "policy": engine.policy.name}
        info = GaugeMetricFamily("armillary_cache_config_info", "How the KV cache is set up", labels=["model_name", *config])
        info.add_metric([model, *map(str, config.values())], 1)
        yield info
        finished = CounterMetricFamily(
            "armillary_requests_finished", "Requests that ended, by reason", labels=["model_name", "finished_reason"]
        )
        for reason, count in stats["finished"].items():
            finished.add_metric([model, reason], count)
        yield finished
        if "adapters" in live["features"]:
            yield from _adapter_metrics(live["features"]["adapters"], model)
        if "fleet" in live["features"]:
            yield from fleet_metrics(live["features"]["fleet"], model)


def _adapter_metrics(state: Mapping[str, Any], model: str) -> Iterator[Metric]:
    for name, help_text, value in (
        ("adapters_loaded", "Adapters whose weights are in memory", state["loaded"]),
        ("adapters_bytes", "Memory of their weights", state["bytes"]),
    ):
        gauge = GaugeMetricFamily(f"armillary_{name}", help_text, labels=["model_name"])
        gauge.add_metric([model], value)
        yield gauge
    running = GaugeMetricFamily(
        "armillary_adapter_requests_unfinished", "Requests with an adapter that have not ended", labels=["model_name", "adapter"]
    )
    users: dict[str, int] = {}  # a name may have two versions for a while
    for row in state["adapters"]:
        users[row["name"]] = users.get(row["name"], 0) + row["running"]
    for adapter, count in users.items():
        running.add_metric([model, adapter], count)
    yield running


class _Both(Collector):
    """Every metric under its own name and, when asked for, under vLLM's."""

    def __init__(self, own: CollectorRegistry, vllm_names: bool) -> None:
        self._own = own
        self._vllm_names = vllm_names

    def collect(self) -> Iterable[Metric]:
        for metric in self._own.collect():
            yield metric
            alias = VLLM_NAMES.get(metric.name)
            if self._vllm_names and alias is not None:
                renamed = Metric(alias, f"{metric.documentation} (same as {metric.name})", metric.type)
                renamed.samples = [sample._replace(name=alias + sample.name[len(metric.name) :]) for sample in metric.samples]
                yield renamed
