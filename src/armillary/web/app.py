"""The page at `/` beside the API: static files from this package, and the engine's live state that the page draws."""

from __future__ import annotations

import mimetypes
from importlib import resources
from typing import Annotated, Any, Final

from fastapi import FastAPI, Query
from fastapi.responses import Response
from pydantic_core import to_json

from armillary import __version__
from armillary.core.errors import NotFoundError
from armillary.serve.http import app as api
from armillary.serve.http import errors
from armillary.serve.http.exchange import Exchanges
from armillary.serve.http.guards import HostGuard
from armillary.serve.http.openapi import describe
from armillary.serve.service import Service
from armillary.web.simulate import router as simulate

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
_STATIC: Final = resources.files("armillary.web").joinpath("static")
PAGE: Final = _STATIC.joinpath("index.html").read_text("utf-8")
TABS: Final = 'data-tabs="chat simulate"'
"""Which tabs the page has, in its body element."""


def create_app(service: Service, *, simulations: int = 2, **options: Any) -> FastAPI:
    """The API of `serve.http.app.create_app`, which takes `options`, with the page on top.

    The page itself needs no API key (it asks for one when the API does); what it shows of the engine does. `simulations` may run at a time.
    """
    app = api.create_app(service, open_paths=("/", "/favicon.ico"), open_prefixes=("/static/",), **options)
    _add_page(app, PAGE)
    path = getattr(service.loaded, "source_path", None)
    app.include_router(simulate.router(simulations, {} if path is None else {service.model_name: path}))

    @app.get("/live", include_in_schema=False)
    def live(since: Annotated[int, Query(ge=-1, lt=2**53)] = -1) -> Response:
        """The engine as it is now; of its iterations only those after `since`."""
        state = service.engine.snapshot(since)
        state["model"] = {"name": service.model_name, "description": service.loaded.description, "context": service.context}
        return Response(to_json(state), media_type="application/json", headers={"cache-control": "no-store"})

    return app


def create_simulation_app(simulations: int = 2) -> FastAPI:
    """The page's tab for virtual time alone, without a model; for this machine's own use."""
    app = FastAPI(title="Armillary", version=__version__, docs_url=None, redoc_url=None)
    errors.install(app)
    describe(app, keys=False)
    _add_page(app, PAGE.replace(TABS, TABS.replace("chat simulate", "simulate")))
    app.include_router(simulate.router(simulations))
    app.add_middleware(HostGuard)
    app.add_middleware(Exchanges)
    return app


def _add_page(app: FastAPI, index: str) -> None:
    """`/` and what it loads."""
    files = {entry.name: entry.read_bytes() for entry in _STATIC.iterdir() if entry.is_file()} | {"index.html": index.encode()}

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
