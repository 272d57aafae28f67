"""`/simulate/...`: a workload, a capacity, a trace and a watched engine, all by `armillary simulate` in processes of their own."""

from __future__ import annotations

import asyncio
import json
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from armillary.core.errors import NotFoundError
from armillary.models import hub
from armillary.models.graph.find import unknown
from armillary.models.graph.published import published
from armillary.serve.http.body import read_body
from armillary.serve.http.embeddings import while_connected
from armillary.serve.http.endpoints import documented
from armillary.serve.http.errors import APIError, as_api_error
from armillary.serve.http.sse import DONE, frame
from armillary.web.simulate.body import CapacityBody, ServeBody, Simulation, TraceBody, WatchBody
from armillary.web.simulate.choices import choices
from armillary.web.simulate.processes import SECONDS, Simulator, Slots, within
from armillary.web.simulate.watches import Watches

BODY_BYTES: Final = 64 * 1024
TRACE_BYTES: Final = 256 << 20
At = Annotated[int, Query(ge=0, lt=2**62)]


def router(most: int, models: Mapping[str, Path] | None = None) -> APIRouter:
    """`most` simulations at a time, and as many watched engines for each; `models` are those that are served, by name."""
    routes, slots, watches = APIRouter(), Slots(most), Watches(2 * most)
    served = dict(models or {})

    def command_line(verb: str, body: Simulation) -> list[str]:
        for name in (body.model, body.draft_model):  # a folder beside the server is nobody's business
            if name is not None and name not in served and name.lower() not in published() and name not in hub.aliases():
                raise unknown(name)
        path = served.get(body.model)
        return [verb, *body.arguments(str(path) if path is not None else None)]

    @routes.get("/simulate/choices")
    def offered() -> dict[str, Any]:
        """Names of models, clusters and policies, and this server's bounds."""
        return choices() | {"served": list(served), "simulations": most}

    @routes.post("/simulate/serve", openapi_extra=documented(ServeBody))
    async def serve(request: Request) -> Response:
        body = await read_body(request, ServeBody, BODY_BYTES)

        async def work() -> bytes:
            async with await Simulator.start([*command_line("serve", body), "--json"]) as simulator:
                return await simulator.output()

        with slots.taken():
            said = await while_connected(request.receive, _bounded(body.command("serve"), work))
        return _json(json.loads(said) | {"command": body.command("serve")})

    @routes.post("/simulate/trace", openapi_extra=documented(TraceBody), response_class=Response)
    async def trace(request: Request) -> Response:
        """The trace of one replica, for ui.perfetto.dev."""
        body = await read_body(request, TraceBody, BODY_BYTES)

        async def work() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "trace.json"
                async with await Simulator.start([*command_line("serve", body), "--json", f"--save={path}"]) as simulator:
                    await simulator.output()
                if path.stat().st_size > TRACE_BYTES:
                    raise APIError(
                        400, f"the trace has over {TRACE_BYTES >> 20} MiB: ask for fewer requests", param="requests", code="invalid_value"
                    )
                return path.read_bytes()

        with slots.taken():
            content = await while_connected(request.receive, _bounded(body.command("serve") + " --save trace.json", work))
        headers = {"content-disposition": 'attachment; filename="trace.json"', "cache-control": "no-store"}
        return Response(content, media_type="application/json", headers=headers)

    @routes.post("/simulate/capacity", openapi_extra=documented(CapacityBody), response_class=Response)
    async def capacity(request: Request) -> Response:
        """Server-sent events: a `probe` for every rate as it has been tried, then the `capacity`, then `[DONE]`."""
        body = await read_body(request, CapacityBody, BODY_BYTES)
        command, until = body.command("capacity"), asyncio.get_running_loop().time() + SECONDS
        async with AsyncExitStack() as stack:
            stack.enter_context(slots.taken())
            simulator = await stack.enter_async_context(await Simulator.start([*command_line("capacity", body), "--json"]))
            lines = simulator.lines()
            first = await while_connected(request.receive, _bounded(command, lines.__anext__))
            kept = stack.pop_all()

        return LineStream(lines, first | {"command": command}, kept, until)

    @routes.post("/simulate/watch", openapi_extra=documented(WatchBody))
    async def watch(request: Request) -> dict[str, Any]:
        """An engine to look at, for as long as somebody does."""
        slots.check_allowed()
        body = await read_body(request, WatchBody, BODY_BYTES)
        begun = await watches.begin(command_line("watch", body), body.command("watch"))
        return {"id": begun.id}

    @routes.get("/simulate/watch/{watch_id}")
    async def look(watch_id: str, at: At, since: Annotated[int, Query(ge=-1, lt=2**53)] = -1) -> Response:
        """What `/live` has, at `at` ns of virtual time."""
        return _json(await watches.get(watch_id).ask({"at": at, "since": since}))

    @routes.get("/simulate/watch/{watch_id}/requests/{request_id}")
    async def explain(watch_id: str, request_id: str, at: At) -> dict[str, Any]:
        """What `/requests/{id}` has, at `at` ns of virtual time."""
        told = await watches.get(watch_id).ask({"at": at, "explain": request_id})
        if told["events"] is None:
            raise NotFoundError(f"request {request_id[:100]!r} has not come yet, or ended too long ago", "ask at another time", field="id")
        return {"id": request_id, "requests": [{"id": request_id, "events": told["events"]}]}

    @routes.delete("/simulate/watch/{watch_id}")
    async def end(watch_id: str) -> dict[str, Any]:
        await watches.end(watch_id)
        return {"id": watch_id, "deleted": True}

    return routes


class LineStream(Response):
    """What a simulation says as server-sent events; what is `kept` for it goes when it ends or the client does, or at
    `until`, s of the loop's clock."""

    media_type = "text/event-stream"

    def __init__(self, lines: AsyncIterator[dict[str, Any]], first: dict[str, Any], kept: AsyncExitStack, until: float) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._lines, self._first, self._kept, self._until = lines, first, kept, until

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._kept:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": frame(self._first), "more_body": True})
            last = DONE
            try:
                async with within(SECONDS, self._first["command"], self._until):
                    while True:
                        line = await while_connected(receive, anext(self._lines))
                        await send({"type": "http.response.body", "body": frame(line), "more_body": True})
            except StopAsyncIteration:
                pass
            except (APIError, ValueError) as error:
                last = frame(as_api_error(error).body) + DONE
            await send({"type": "http.response.body", "body": last, "more_body": False})


async def _bounded(command: str, work: Callable[[], Awaitable[Any]]) -> Any:
    async with within(SECONDS, command):
        return await work()


def _json(content: dict[str, Any]) -> Response:
    return Response(to_json(content), media_type="application/json", headers={"cache-control": "no-store"})
