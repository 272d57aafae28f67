"""`/v1/batches`: files of requests, answered when there is room for them beside everybody else's."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Collection
from functools import partial
from itertools import chain
from typing import Annotated, Any, ClassVar, Literal

from fastapi import APIRouter, Query, Request
from pydantic import Field
from pydantic_core import to_json
from starlette.types import ASGIApp

from armillary.serve.http import exchange
from armillary.serve.http.batch_line import Line, answer_line, check_endpoint, parse_lines, succeeded, unanswered
from armillary.serve.http.body import Body, read_body
from armillary.serve.http.endpoints import documented
from armillary.serve.http.errors import APIError
from armillary.serve.http.exchange import owner
from armillary.serve.http.file_store import FileStore, page
from armillary.serve.http.schemas.responses import MAX_METADATA, Key, Note

log = logging.getLogger("armillary.http")

Json = dict[str, Any]

IN_FLIGHT = 64  # lines of all batches that are being answered
MAX_BATCHES = 1000
MAX_PAGE = 100
WINDOW_SECONDS = 24 * 3600
UNANSWERED = {
    "expired": "the batch's 24 hours were over before this line's turn",
    "cancelled": "the batch was cancelled before this line's turn",
}
ENDED = ("completed", "failed", "expired", "cancelled")
MAX_BODY_BYTES = 64 * 1024


class BatchBody(Body):
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"output_expires_after": ()}

    input_file_id: str = Field(max_length=128)
    endpoint: str = Field(max_length=128)
    completion_window: Literal["24h"]
    metadata: dict[Key, Note] = Field(default_factory=dict, max_length=MAX_METADATA)


def router(api: ASGIApp, store: FileStore, endpoints: Collection[str]) -> APIRouter:
    """`api` answers the lines, which may ask `endpoints`. Batches that an earlier process left unfinished have failed."""
    routes = APIRouter()
    runner = BatchRunner(api, store)
    for left in store.records():
        if left["status"] not in ENDED:
            problem = {
                "code": "server_stopped",
                "message": "the server stopped before the batch was complete: create it again",
                "line": None,
                "param": None,
            }
            store.keep({**left, "status": "failed", "failed_at": int(time.time()), "errors": {"object": "list", "data": [problem]}})

    @routes.post("/v1/batches", openapi_extra=documented(BatchBody))
    async def create(request: Request) -> Json:
        body = await read_body(request, BatchBody, MAX_BODY_BYTES)
        check_endpoint(body.endpoint, endpoints)
        store.get(body.input_file_id, owner(), "input_file_id")
        if len(store.records()) >= MAX_BATCHES:  # the oldest that has ended goes: one of the same key before anybody else's
            ended = [one for one in chain(store.records(), store.records(owner())) if one["status"] in ENDED]
            if not ended:
                raise APIError(
                    429, f"{MAX_BATCHES:,} batches run: come back when one has ended", code="over_capacity", headers={"Retry-After": "60"}
                )
            store.drop(ended[-1]["id"])
        return runner.start(body)

    @routes.get("/v1/batches")
    async def listed(
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20, after: Annotated[str | None, Query(max_length=128)] = None
    ) -> Json:
        return page(store.records(owner()), limit, after, partial(store.record, owner=owner()))

    @routes.get("/v1/batches/{batch_id}")
    async def one(batch_id: str) -> Json:
        return store.record(batch_id, owner())

    @routes.post("/v1/batches/{batch_id}/cancel")
    async def cancel(batch_id: str) -> Json:
        batch = store.record(batch_id, owner())
        if batch["status"] in ENDED and batch["status"] != "cancelled":
            raise APIError(
                400,
                f"batch {batch_id!r} has ended ({batch['status']}): only a running one can be cancelled",
                param="batch_id",
                code="not_running",
            )
        return runner.cancel(batch)

    return routes


class BatchRunner:
    """Answers the lines of all batches, at most `IN_FLIGHT` at a time. What the engine refuses for now waits, so that others go first."""

    def __init__(self, api: ASGIApp, store: FileStore) -> None:
        self._api = api
        self._store = store
        self._room = asyncio.Semaphore(IN_FLIGHT)
        self._running: dict[str, asyncio.Task[None]] = {}

    def start(self, body: BatchBody) -> Json:
        now = int(time.time())
        batch: Json = {
            "id": f"batch_{secrets.token_hex(12)}",
            "object": "batch",
            "endpoint": body.endpoint,
            "errors": None,
            "input_file_id": body.input_file_id,
            "completion_window": body.completion_window,
            "status": "validating",
            "output_file_id": None,
            "error_file_id": None,
            "created_at": now,
            "in_progress_at": None,
            "expires_at": now + WINDOW_SECONDS,
            "finalizing_at": None,
            "completed_at": None,
            "failed_at": None,
            "expired_at": None,
            "cancelling_at": None,
            "cancelled_at": None,
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
            "metadata": body.metadata,
        }
        self._store.keep(batch, owner())
        task = asyncio.create_task(self._run(batch))
        self._running[batch["id"]] = task
        task.add_done_callback(lambda _: self._running.pop(batch["id"], None))
        return dict(batch)

    def cancel(self, batch: Json) -> Json:
        task = self._running.get(batch["id"])
        if task is not None and batch["status"] not in ("cancelling", "finalizing"):
            self._turn(batch, "cancelling")
            task.cancel()
        return dict(batch)

    def _turn(self, batch: Json, status: str) -> None:
        batch["status"] = status
        if f"{status}_at" in batch:
            batch[f"{status}_at"] = int(time.time())
        self._store.keep(batch)

    def _fail(self, batch: Json, problems: list[Json]) -> None:
        batch["errors"] = {"object": "list", "data": problems}
        self._turn(batch, "failed")

    async def _run(self, batch: Json) -> None:
        results: list[Json | None] = []
        lines: list[Line] = []
        end = "completed"
        try:
            async with asyncio.timeout(batch["expires_at"] - time.time()):
                content = await asyncio.to_thread(self._store.content, batch["input_file_id"], owner(), "input_file_id")
                lines, problems = await asyncio.to_thread(parse_lines, content, (batch["endpoint"],))
                if problems:
                    self._fail(batch, problems)
                    return
                batch["request_counts"]["total"] = len(lines)
                self._turn(batch, "in_progress")
                results = [None] * len(lines)
                await self._answer(batch, lines, results)
        except TimeoutError:
            end = "expired"
        except asyncio.CancelledError:
            if batch["status"] != "cancelling":  # the server's loop is closing
                raise
            end = "cancelled"
        except Exception as error:
            self._broke(batch, error)
            return
        try:
            await self._finish(batch, lines, results, end)
        except Exception as error:  # a disk that is full
            self._broke(batch, error)

    def _broke(self, batch: Json, error: Exception) -> None:
        log.error("batch %s failed", batch["id"], exc_info=error)
        self._fail(batch, [{"code": "server_error", "message": "the server failed: its log has the details", "line": None, "param": None}])

    async def _answer(self, batch: Json, lines: list[Line], results: list[Json | None]) -> None:
        counts = batch["request_counts"]

        async def one(index: int) -> None:
            exchange.begin_apart(lines[index].url)
            results[index] = result = await answer_line(self._api, lines[index])
            counts["completed" if succeeded(result) else "failed"] += 1

        async with asyncio.TaskGroup() as group:
            for index in range(len(lines)):
                await self._room.acquire()
                group.create_task(one(index)).add_done_callback(lambda _: self._room.release())

    async def _finish(self, batch: Json, lines: list[Line], results: list[Json | None], end: str) -> None:
        """Results in the order of the lines: those of success in one file, all others in another."""
        if end == "completed":
            self._turn(batch, "finalizing")
        try:
            await asyncio.to_thread(self._write, batch, lines, results, end, owner())
        except APIError as error:  # no room for them
            self._fail(batch, [{"code": "files_full", "message": str(error), "line": None, "param": None}])
            return
        self._turn(batch, end)

    def _write(self, batch: Json, lines: list[Line], results: list[Json | None], end: str, key: str) -> None:
        """The two files, for the key's owner. On a thread of its own, and each row is encoded when its turn has come."""
        word = UNANSWERED.get(end, "")
        filled = [result or unanswered(line, f"batch_{end}", word) for line, result in zip(lines, results, strict=True)]
        for name, wanted in (("output", True), ("error", False)):
            rows = [result for result in filled if succeeded(result) is wanted]
            if rows:
                encoded = (to_json(row) + b"\n" for row in rows)
                file = self._store.put(f"{batch['id']}_{name}.jsonl", "batch_output", encoded, key)
                batch[f"{name}_file_id"] = file["id"]
