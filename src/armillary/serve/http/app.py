"""The server's application: endpoints, errors, guards and metrics put together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import PlainTextResponse, Response
from starlette.middleware.cors import CORSMiddleware

from armillary import __version__
from armillary.serve.http import adapters, batches, debug, embeddings, endpoints, errors, files, messages, requests, responses
from armillary.serve.http.drain import DrainGuard
from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import Exchanges, Linked
from armillary.serve.http.file_store import FileStore
from armillary.serve.http.guards import LOOPBACK_HOSTS, HostGuard, KeyGuard
from armillary.serve.http.metrics import Metrics
from armillary.serve.http.openapi import describe
from armillary.serve.http.operations import Operations
from armillary.serve.http.rate_limits import RateGuard, RateLimits
from armillary.serve.operations.keys import KeyRing
from armillary.serve.operations.occupancy import Occupancy
from armillary.serve.operations.recent import RecentRequests
from armillary.serve.operations.shedding import Bounds
from armillary.serve.request import Request
from armillary.serve.service import Service
from armillary.serve.streams import Observers

MAX_BODY_BYTES = 4 * 1024 * 1024
OPEN_PATHS = ("/health",)
BATCHED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")  # what lines of batches may ask
RATE_LIMIT_HEADERS = tuple(f"x-ratelimit-{what}-{kind}" for kind in ("requests", "tokens") for what in ("limit", "remaining", "reset"))


def endpoints_alone(service: Service, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """The endpoints that compute, without guards and limits: for this process's own use, such as the lines of batches."""
    inner = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
    errors.install(inner)
    for endpoints_of in (endpoints, responses, messages, embeddings):
        inner.include_router(endpoints_of.router(service, max_body_bytes))
    return inner


def create_app(
    service: Service,
    *,
    api_key: str | KeyRing | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_HOSTS,
    cors_origins: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    vllm_metrics: bool = True,
    open_paths: Collection[str] = (),
    open_prefixes: Collection[str] = (),
    operations: Operations = Operations(),  # noqa: B008 (frozen)
) -> FastAPI:
    """An ASGI application for one service, whose engine must be running (`engine.start()`).

    `api_key`: required as `Authorization: Bearer KEY` everywhere but on `/health`, `open_paths` and below
    `open_prefixes`; a ring has several, each with its limits. `allowed_hosts`: Host headers that are answered ("*" for all; name your host when you bind
    beyond loopback). `cors_origins`: web origins that browsers let in; none by default. `vllm_metrics`: also export
    metrics under vLLM's names.
    """
    keys = KeyRing.of([api_key]) if isinstance(api_key, str) else api_key
    limits = RateLimits(keys) if keys is not None else None
    engine, drain = service.engine, operations.drain
    bounds = Bounds(engine.config.max_queue, engine.snapshot()["blocks"]["total"], operations.max_queued_kv, operations.shed_after)
    occupancy = Occupancy(engine.clock, engine.limits.block_size, bounds)
    recent = RecentRequests(engine.clock)
    app = FastAPI(title="Armillary", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    describe(app, keys=keys is not None)
    metrics = Metrics(service, vllm_names=vllm_metrics)
    service.observer = Observers([Linked(), metrics, occupancy, *([limits] if limits else []), recent, drain, *operations.observers])

    def gate(group: Sequence[Request]) -> None:
        occupancy.admit(group)
        if limits is not None:
            limits.admit(group)  # last: what is not taken is not charged

    service.gate = gate
    inner = endpoints_alone(service, max_body_bytes)
    app.include_router(inner.router)
    app.include_router(adapters.router(service, max_body_bytes, operations.adapter_directory))
    store = operations.files if operations.files is not None else FileStore()
    app.include_router(files.router(store))
    app.include_router(batches.router(inner, store, BATCHED))
    app.include_router(requests.router(service, recent))
    app.include_router(debug.router(service, operations.debug_trace))

    @app.get("/health")
    async def health() -> dict[str, str]:
        if drain.draining:
            raise drain.refusal()
        if not service.alive:
            raise APIError(503, "the engine does not run", type="server_error", code="engine_stopped")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__, "model": service.model_name}

    @app.get("/metrics", response_class=PlainTextResponse)
    def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # The last added is the outermost: the host is looked at first, then CORS (preflights carry no key), then the key.
    if limits is not None:
        app.add_middleware(RateGuard, limits=limits)
    if keys is not None:
        app.add_middleware(KeyGuard, keys=keys, open_paths=(*OPEN_PATHS, *open_paths), open_prefixes=open_prefixes)
    app.add_middleware(DrainGuard, drain=drain)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "x-armillary-ignored", "retry-after", *RATE_LIMIT_HEADERS],
        )
    app.add_middleware(HostGuard, allowed=allowed_hosts)
    logs = [operations.access_log] if operations.access_log is not None else []
    app.add_middleware(Exchanges, listeners=[metrics.answered, *logs])
    return app
