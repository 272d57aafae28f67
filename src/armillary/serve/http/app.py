"""The server's application: endpoints, errors, guards and metrics put together."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware

from armillary import __version__
from armillary.core.errors import InputError
from armillary.serve.http import endpoints, errors, messages, responses
from armillary.serve.http.errors import APIError
from armillary.serve.http.guards import LOOPBACK_HOSTS, HostGuard, KeyGuard
from armillary.serve.http.metrics import Metrics
from armillary.serve.service import Service

MAX_BODY_BYTES = 4 * 1024 * 1024
OPEN_PATHS = ("/health",)


def create_app(
    service: Service,
    *,
    api_key: str | None = None,
    allowed_hosts: Collection[str] = LOOPBACK_HOSTS,
    cors_origins: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    vllm_metrics: bool = True,
    open_paths: Collection[str] = (),
    open_prefixes: Collection[str] = (),
) -> FastAPI:
    """An ASGI application for one service, whose engine must be running (`engine.start()`).

    `api_key`: required as `Authorization: Bearer KEY` everywhere but on `/health`, `open_paths` and below
    `open_prefixes`. `allowed_hosts`: Host headers that are answered ("*" for all; name your host when you bind
    beyond loopback). `cors_origins`: web origins that browsers let in; none by default. `vllm_metrics`: also export
    metrics under vLLM's names.
    """
    if api_key is not None and not api_key.strip():
        raise InputError("the API key is empty", "give one with at least one character, or none at all", field="api_key")
    app = FastAPI(title="Armillary", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    metrics = Metrics(service, vllm_names=vllm_metrics)
    service.observer = metrics
    for endpoints_of in (endpoints, responses, messages):
        app.include_router(endpoints_of.router(service, max_body_bytes))

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not service.alive:
            raise APIError(503, "the engine does not run", type="server_error", code="engine_stopped")
        return {"status": "ok"}

    @app.get("/version")
    async def version() -> dict[str, Any]:
        return {"version": __version__, "model": service.model_name}

    @app.get("/metrics")
    def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # The last added is the outermost: the host is looked at first, then CORS (preflights carry no key), then the key.
    if api_key is not None:
        app.add_middleware(KeyGuard, key=api_key, open_paths=(*OPEN_PATHS, *open_paths), open_prefixes=open_prefixes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type"],
            expose_headers=["x-request-id", "x-armillary-ignored"],
        )
    app.add_middleware(HostGuard, allowed=allowed_hosts)
    return app
