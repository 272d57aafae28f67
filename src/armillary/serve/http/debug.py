"""`GET /debug/trace`: the next seconds of the engine's trace as a file for ui.perfetto.dev."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from armillary.core.trace import Trace
from armillary.core.trace_perfetto import to_json
from armillary.serve.http.errors import APIError
from armillary.serve.service import Service

LONGEST_SECONDS = 60.0


def router(service: Service, trace: Trace | None) -> APIRouter:
    routes = APIRouter()

    @routes.get("/debug/trace", response_class=Response)
    async def debug_trace(seconds: Annotated[float, Query(gt=0, le=LONGEST_SECONDS)] = 5.0) -> Response:
        """Waits that long, then gives all spans that ended meanwhile. Their lanes are the engine and each request; no text is in it."""
        if trace is None:
            raise APIError(403, "/debug/trace is off: serve with --allow-debug", type="permission_error", code="debug_not_allowed")
        since = service.engine.clock.now()
        await asyncio.sleep(seconds)
        pieces = await asyncio.to_thread(lambda: "".join(to_json(since_then(trace, since, service.engine.clock.now()))))
        headers = {"content-disposition": 'attachment; filename="trace.json"', "cache-control": "no-store"}
        return Response(pieces, media_type="application/json", headers=headers)

    return routes


def since_then(trace: Trace, start: int, end: int) -> Trace:
    """The part of a trace that ended in (start, end], ns; as long as it was kept."""
    spans = [span for span in trace.tail(start) if span.end <= end]
    part = Trace(trace.name, capacity=max(1, len(spans)), meta={"from_ns": start, "to_ns": end})
    part.extend(spans)
    for sample in trace.tail_counters(start):
        if sample.at <= end:
            part.count(sample.track, sample.at, sample.values)
    return part
