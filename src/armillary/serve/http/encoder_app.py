"""The application of an encoder: embeddings and reranking, and nothing that generates."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from armillary import __version__
from armillary.core.errors import InputError
from armillary.serve.embedder import EncoderService
from armillary.serve.http import batches, embeddings, errors, files
from armillary.serve.http.app import MAX_BODY_BYTES, OPEN_PATHS
from armillary.serve.http.drain import DrainGuard
from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import Exchanges
from armillary.serve.http.file_store import FileStore
from armillary.serve.http.guards import LOOPBACK_HOSTS, HostGuard, KeyGuard
from armillary.serve.http.operations import Operations
from armillary.serve.http.rate_limits import RateGuard, RateLimits
from armillary.serve.operations.keys import KeyRing

EMBEDDING = ("/v1/embeddings", "/v1/rerank")  # by lines of batches too
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")


def endpoints_alone(service: EncoderService, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The endpoints that embed, without guards: for this process's own use, such as the lines of batches."""
    inner = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    errors.install(inner)
    inner.include_router(embeddings.router(service, max_body_bytes))
    return inner


def create_encoder_app(
    service: EncoderService,
    *,
    api_key: str | KeyRing | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_HOSTS,
    max_body_bytes: int = MAX_BODY_BYTES,
    operations: Operations = Operations(),  # noqa: B008 (frozen)
) -> FastAPI:
    """An ASGI application for one encoder, which must be running (`service.start()`). Options as those of `http.app.create_app`; of the operations the log and the drain."""
    keys = KeyRing.of([api_key]) if isinstance(api_key, str) else api_key
    limits = RateLimits(keys) if keys is not None else None
    service.gate = limits.admit_tokens if limits is not None else None
    drain = operations.drain
    app = FastAPI(title="Armillary", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    inner = endpoints_alone(service, max_body_bytes)
    app.include_router(inner.router)
    store = operations.files if operations.files is not None else FileStore()
    app.include_router(files.router(store))
    app.include_router(batches.router(inner, store, EMBEDDING))
    registry = CollectorRegistry()
    registry.register(_Metrics(service))

    def model_card() -> dict[str, Any]:
        limits = {"max_model_len": service.max_input_tokens, "dimensions": service.dimensions}
        return {"id": service.model_name, "object": "model", "created": int(service.started_at), "owned_by": "armillary", **limits}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card()]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        service.check_model(model_id)
        return model_card()

    async def generates() -> None:
        raise InputError(
            f"{service.model_name!r} is an encoder and generates no text",
            "ask /v1/embeddings or /rerank, or serve another model",
            field="model",
        )

    for path in GENERATING:
        app.post(path, include_in_schema=False)(generates)

    @app.get("/health")
    async def health() -> dict[str, str]:
        if drain.draining:
            raise drain.refusal()
        if not service.alive:
            raise APIError(503, "the encoder does not run", type="server_error", code="engine_stopped")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__, "model": service.model_name}

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(generate_latest(registry), media_type="text/plain; version=0.0.4; charset=utf-8")

    if keys is not None and limits is not None:
        app.add_middleware(RateGuard, limits=limits)
        app.add_middleware(KeyGuard, keys=keys, open_paths=OPEN_PATHS)
    app.add_middleware(DrainGuard, drain=drain)
    app.add_middleware(HostGuard, allowed=allowed_hosts)
    app.add_middleware(Exchanges, listeners=[operations.access_log] if operations.access_log is not None else [])
    return app


class _Metrics:
    """The encoder's counts, read when they are scraped."""

    def __init__(self, service: EncoderService) -> None:
        self._service = service

    def collect(self) -> Any:
        stats, labels = self._service.stats, (["model_name"], [self._service.model_name])
        for name, words, value in (
            ("armillary_embedded_sequences", "Inputs that became vectors.", stats.sequences),
            ("armillary_embedded_tokens", "Tokens of those inputs.", stats.tokens),
            ("armillary_embedding_batches", "Batches that they were computed in.", stats.batches),
            ("armillary_embedding_seconds", "Time spent computing them.", stats.busy_seconds),
        ):
            counter = CounterMetricFamily(name, words, labels=labels[0])
            counter.add_metric(labels[1], value)
            yield counter
        gauge = GaugeMetricFamily("armillary_embeddings_waiting", "Inputs that wait for a batch.", labels=labels[0])
        gauge.add_metric(labels[1], self._service.waiting)
        yield gauge
