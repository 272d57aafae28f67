"""`GET /requests` and `/requests/{id}`: which requests there were, and in words why each waited, was cut into chunks or started over."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Path, Query

from armillary.core.errors import NotFoundError
from armillary.serve.operations.recent import KEPT, RecentRequests
from armillary.serve.service import Service


def router(service: Service, recent: RecentRequests) -> APIRouter:
    routes = APIRouter()

    @routes.get("/requests")
    def latest(limit: Annotated[int, Query(ge=1, le=KEPT)] = 50) -> dict[str, Any]:
        """Running and waiting requests, then those that have ended, the latest first."""
        return {"object": "list", "data": recent.rows()[:limit]}

    @routes.get("/requests/{request_id:path}")
    def one(request_id: Annotated[str, Path(max_length=200)]) -> dict[str, Any]:
        """What happened to an answer's requests and why, one line an event."""
        rows = list(recent.of(request_id))
        ids = [row["id"] for row in rows] or [request_id]
        stories = {each: words for each in ids if (words := service.engine.explain(each)) is not None}
        if not stories:
            raise NotFoundError(f"request {request_id!r} is unknown, or ended too long ago", "ask while it runs or soon after", field="id")
        known = {row["id"]: row for row in rows}
        return {"id": request_id, "requests": [{**known.get(each, {"id": each}), "events": words} for each, words in stories.items()]}

    return routes
