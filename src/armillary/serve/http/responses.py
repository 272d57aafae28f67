"""`/v1/responses`: answers with a memory. A stored response can be asked for, continued, cancelled and deleted."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive, Scope, Send

from armillary.core.errors import NotFoundError
from armillary.serve.http.answers import failure
from armillary.serve.http.body import read_body
from armillary.serve.http.endpoints import documented, ignored, named
from armillary.serve.http.errors import APIError, as_api_error
from armillary.serve.http.exchange import owner
from armillary.serve.http.held_to import held_to, told
from armillary.serve.http.off_loop import off_loop
from armillary.serve.http.response_answer import ResponseAnswer
from armillary.serve.http.response_store import ResponseStore, StoredResponse
from armillary.serve.http.schemas.items import conversation
from armillary.serve.http.schemas.responses import ResponsesBody
from armillary.serve.http.sse import EventStream, whole
from armillary.serve.service import Service
from armillary.serve.streams import AsyncStream

Json = dict[str, Any]
MAX_PAGE = 100


def router(service: Service, max_body_bytes: int) -> APIRouter:
    routes = APIRouter()
    store = ResponseStore()
    background: set[asyncio.Task[None]] = set()  # asyncio itself holds tasks weakly

    @routes.post("/v1/responses", openapi_extra=documented(ResponsesBody))
    async def create(request: Request) -> Response:
        arrival = service.engine.clock.now()
        body = await read_body(request, ResponsesBody, max_body_bytes)
        served = await named(service, body.model)
        items = (*_earlier(store, body.previous_response_id), *body.input)
        messages = conversation(items, body.instructions)
        toolbox = body.toolbox
        size = sum(len(message["content"]) for message in messages) + told(toolbox)
        prompt = await off_loop(size, lambda: service.chat_tokens(messages, toolbox=toolbox))
        room = service.room(len(prompt), body.max_output_tokens, "input")
        sampling = service.check_sampling(body.sampling(room, logprobs=body.wanted_logprobs))
        compiled = await held_to(service, body.text.format.grammar if body.text.format.type != "text" else None, toolbox)
        response_id = service.new_id("resp")
        stream: AsyncStream | None = None

        def ended() -> None:
            stored.conversation = (*items, *_replayed(answer.response["output"]))
            stored.cancel = lambda: None  # and with it go the request and its tokens
            if store.holds(stored):
                store.keep(stored)

        answer = ResponseAnswer(served, response_id, body, len(prompt), ended, toolbox)
        stored = StoredResponse(answer.response, body.input, items, lambda: _stop(stream, answer), owner())
        stream = served.start(
            response_id, [prompt], [sampling], arrival=arrival, cache_salt=body.cache_salt or "", grammar=compiled, **body.turn(arrival)
        )
        (answer.request,) = stream.requests
        if body.store:
            store.keep(stored)
        headers = {"x-request-id": response_id, **ignored(body)}
        if body.background:
            task = asyncio.create_task(_alone(stream, answer))
            background.add(task)
            task.add_done_callback(background.discard)
            return _json(answer.response, headers)
        if body.stream:
            return _ResponseStream(stream, answer, headers)
        try:
            return await whole(request, stream, answer, headers)
        except Exception as error:
            answer.stop(as_api_error(error))
            raise
        finally:
            answer.stop()

    @routes.get("/v1/responses/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        _no_query(request)
        return _json(store.get(response_id, owner()).response)

    @routes.delete("/v1/responses/{response_id}")
    async def delete(response_id: str) -> Json:
        store.delete(response_id, owner()).cancel()
        return {"id": response_id, "object": "response", "deleted": True}

    @routes.post("/v1/responses/{response_id}/cancel")
    async def cancel(response_id: str) -> Response:
        stored = store.get(response_id, owner())
        status = stored.response["status"]
        if status not in ("in_progress", "cancelled"):
            raise APIError(
                400,
                f"response {response_id!r} has ended ({status}): only a running one can be cancelled",
                param="response_id",
                code="not_running",
            )
        stored.cancel()
        return _json(stored.response)

    @routes.get("/v1/responses/{response_id}/input_items")
    async def input_items(
        request: Request,
        response_id: str,
        limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        _no_query(request, "limit", "order", "after")
        items = [_listed(response_id, index, one) for index, one in enumerate(store.get(response_id, owner()).input)]
        if order == "desc":
            items.reverse()
        begin = 0
        if after is not None:
            found = [index for index, one in enumerate(items) if one["id"] == after]
            if not found:
                raise NotFoundError(
                    f"response {response_id!r} has no input item {after[:128]!r}", "page on from an id of this list", field="after"
                )
            begin = found[0] + 1
        page = items[begin : begin + limit]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {"first_id": None, "last_id": None}
        return _json({"object": "list", "data": page, **ends, "has_more": len(items) > begin + limit})

    return routes


class _ResponseStream(EventStream):
    """A stream whose response ends when its client has gone, too."""

    def __init__(self, stream: AsyncStream, answer: ResponseAnswer, headers: dict[str, str]) -> None:
        super().__init__(stream, answer, headers)
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answer.stop()


async def _alone(stream: AsyncStream, answer: ResponseAnswer) -> None:
    """Carry a response to its end without a client that waits."""
    with contextlib.suppress(asyncio.CancelledError):
        async for batch in stream.batches():
            for choice, event in batch:
                error = failure(event)
                if error is not None:
                    answer.stop(error)
                elif not answer.ended:
                    answer.add(choice, event)
    answer.stop()


def _stop(stream: AsyncStream | None, answer: ResponseAnswer) -> None:
    if stream is not None:
        stream.cancel()
    answer.stop()


def _earlier(store: ResponseStore, name: str | None) -> tuple[Json, ...]:
    """The items of the conversation that a request continues: calls of functions and their outputs too."""
    if name is None:
        return ()
    try:
        stored = store.get(name, owner())
    except NotFoundError as error:
        raise APIError(404, str(error), param="previous_response_id", code="previous_response_not_found") from None
    if stored.response["status"] == "in_progress":
        raise APIError(
            400,
            f"response {name!r} is still being written: continue it when it has ended",
            param="previous_response_id",
            code="previous_response_in_progress",
        )
    if any(one["type"] == "function_call" and one["status"] == "incomplete" for one in stored.response["output"]):
        raise APIError(
            400,
            f"response {name!r} ended within the arguments of a call: continue the one before it, with a larger max_output_tokens",
            param="previous_response_id",
            code="previous_response_incomplete",
        )
    return stored.conversation


def _replayed(output: list[Json]) -> list[Json]:
    """A response's output as items of the next input."""
    return [
        {name: one[name] for name in ("type", "call_id", "name", "arguments")}
        if one["type"] == "function_call"
        else {"type": "message", "role": "assistant", "content": "".join(part["text"] for part in one["content"])}
        for one in output
    ]


def _listed(response_id: str, index: int, one: Json) -> Json:
    named = {"id": f"{response_id}-in-{index}", "status": "completed", **one}
    if one["type"] == "message":
        kind = "output_text" if one["role"] == "assistant" else "input_text"
        part = {"type": kind, "text": one["content"], **({"annotations": []} if kind == "output_text" else {})}
        named["content"] = [part]
    return named


def _no_query(request: Request, *known: str) -> None:
    for name in request.query_params.keys() - set(known):
        raise APIError(400, f"{name[:100]} is not supported by this server: leave it out", param=name[:100], code="unsupported_parameter")


def _json(value: Json, headers: dict[str, str] | None = None) -> Response:
    return Response(to_json(value), media_type="application/json", headers=headers)
