"""The page at `/` beside the API: static files from this package, and the engine's live state that the page draws."""

from __future__ import annotations

import mimetypes
from importlib import resources
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic_core import to_json

from armillary.core.errors import NotFoundError
from armillary.serve.http import app as api
from armillary.serve.service import Service

# The page loads nothing from anywhere else and runs nothing that is not a file of this package.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(service: Service, **options: Any) -> FastAPI:
    """The API of `serve.http.app.create_app`, which takes `options`, with the page on top.

    The page itself needs no API key (it asks for one when the API does); what it shows of the engine does.
    """
    app = api.create_app(service, open_paths=("/", "/favicon.ico"), open_prefixes=("/static/",), **options)
    files = {entry.name: entry.read_bytes() for entry in resources.files("armillary.web").joinpath("static").iterdir() if entry.is_file()}

    def serve(name: str) -> Response:
        if name not in files:
            raise NotFoundError(f"no file {name[:100]!r}", "load the page at /")
        kind = {"js": "text/javascript", "svg": "image/svg+xml"}.get(name.rpartition(".")[2]) or mimetypes.guess_type(name)[0]
        return Response(files[name], media_type=kind, headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return serve("index.html")

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return serve("sphere.svg")

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        return serve(name)

    @app.get("/live", include_in_schema=False)
    def live(since: Annotated[int, Query(ge=-1, lt=2**53)] = -1) -> Response:
        """The engine as it is now; of its iterations only those after `since`."""
        state = service.engine.snapshot(since)
        state["model"] = {"name": service.model_name, "description": service.loaded.description, "context": service.context}
        return Response(to_json(state), media_type="application/json", headers={"cache-control": "no-store"})

    return app
