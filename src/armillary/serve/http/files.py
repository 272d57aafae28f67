"""`/v1/files`: what batches read and write."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import owner
from armillary.serve.http.file_store import FileStore, Room, page

Json = dict[str, Any]

MULTIPART_ROOM = 64 * 1024  # what a form may take beside its file
UPLOAD_TIMEOUT_SECONDS = 600.0
PIECE = 1 << 20  # bytes that are moved at once
MAX_PAGE = 10_000
MAX_NAME = 512
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {"file": {"type": "string", "format": "binary"}, "purpose": {"const": "batch"}},
    "additionalProperties": False,
}


def router(store: FileStore) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/files", openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM}}}})
    async def upload(request: Request) -> Json:
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise APIError(415, "send the file as multipart/form-data", code="unsupported_media_type")
        try:
            with store.room("the file") as room:
                bounded = _within(request, room)
                async with (
                    asyncio.timeout(UPLOAD_TIMEOUT_SECONDS),
                    bounded.form(max_files=1, max_fields=8, max_part_size=MULTIPART_ROOM) as form,
                ):
                    for name in form.keys() - {"file", "purpose"}:
                        raise APIError(400, f"unknown field {name[:100]!r}: leave it out", param=name[:100], code="unknown_parameter")
                    if form.get("purpose") != "batch":
                        raise APIError(400, "purpose must be batch: files serve batches here", param="purpose", code="invalid_value")
                    file = form.get("file")
                    if not isinstance(file, UploadFile):
                        raise APIError(400, "file: send a file", param="file", code="missing_required_parameter")
                    pieces = iter(partial(file.file.read, PIECE), b"")
                    return await asyncio.to_thread(store.put, (file.filename or "file")[:MAX_NAME], "batch", pieces, owner(), room)
        except TimeoutError:
            raise APIError(408, f"the file did not arrive within {UPLOAD_TIMEOUT_SECONDS:g} s: send it faster", code="timeout") from None
        except HTTPException as error:  # a broken form
            raise APIError(400, f"the form cannot be read: {error.detail}", code="invalid_form") from None

    @routes.get("/v1/files")
    async def listed(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
        after: Annotated[str | None, Query(max_length=128)] = None,
        purpose: Annotated[str | None, Query(max_length=64)] = None,
        order: Literal["asc", "desc"] = "desc",
    ) -> Json:
        rows = [row for row in store.files(owner()) if purpose in (None, row["purpose"])]
        return page(rows if order == "desc" else rows[::-1], limit, after, partial(store.get, owner=owner()))

    @routes.get("/v1/files/{file_id}")
    async def one(file_id: str) -> Json:
        return store.get(file_id, owner())

    @routes.get("/v1/files/{file_id}/content", response_class=Response, responses={200: {"content": {"application/jsonl": {}}}})
    async def content(file_id: str) -> Response:
        return Response(await asyncio.to_thread(store.content, file_id, owner()), media_type="application/jsonl")

    @routes.delete("/v1/files/{file_id}")
    async def delete(file_id: str) -> Json:
        await asyncio.to_thread(store.delete, file_id, owner())
        return {"id": file_id, "object": "file", "deleted": True}

    return routes


def _within(request: Request, room: Room) -> Request:
    """The request, whose body fails with a 413 as soon as the store has no room for what has come of it, or is announced."""
    declared = request.headers.get("content-length", "")
    if declared.isdigit():
        room.grow(int(declared[:20]) - MULTIPART_ROOM)
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await request.receive()
        size += len(message.get("body", b""))
        room.grow(size - MULTIPART_ROOM)
        return message

    return Request(request.scope, counted)
