"""`/v1/messages`: the conversation in Anthropic's words, answered in them too."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic_core import from_json

from armillary.serve.http.body import read_body
from armillary.serve.http.endpoints import documented, ignored, named
from armillary.serve.http.errors import APIError, anthropic_body
from armillary.serve.http.held_to import held_to, told
from armillary.serve.http.off_loop import off_loop
from armillary.serve.http.parts import Begun, Ended, Part, Parts, Step
from armillary.serve.http.schemas.messages import CountBody, MessagesBody
from armillary.serve.http.sse import EventStream, named_frame, whole
from armillary.serve.request import Event
from armillary.serve.request import Request as EngineRequest

if TYPE_CHECKING:
    from armillary.serve.service import Service

Json = dict[str, Any]


def router(service: Service, max_body_bytes: int) -> APIRouter:
    routes = APIRouter()

    async def tokens(body: CountBody) -> tuple[int, ...]:
        service.check_model(body.model)
        messages, prefill = body.conversation()
        toolbox = body.toolbox
        size = sum(len(message["content"]) for message in messages) + len(prefill) + told(toolbox)
        return await off_loop(size, lambda: service.chat_tokens(messages, prefill=prefill, toolbox=toolbox))

    @routes.post("/v1/messages", openapi_extra=documented(MessagesBody))
    async def create(request: Request) -> Response:
        arrival = service.engine.clock.now()
        body = await read_body(request, MessagesBody, max_body_bytes)
        served = await named(service, body.model)
        prompt = await tokens(body)
        sampling = body.sampling(service.room(len(prompt), body.max_tokens, "messages"))
        toolbox = body.toolbox
        compiled = await held_to(service, None, toolbox)
        message_id = service.new_id("msg")
        stream = served.start(
            message_id, [prompt], [sampling], arrival=arrival, cache_salt=body.cache_salt or "", grammar=compiled, **body.turn(arrival)
        )
        answer = MessageAnswer(message_id, served.model_name, stream.requests[0], Parts(service.call_format, toolbox))
        headers = {"request-id": message_id, "x-request-id": message_id, **ignored(body)}
        return EventStream(stream, answer, headers) if body.stream else await whole(request, stream, answer, headers)

    @routes.post("/v1/messages/count_tokens", openapi_extra=documented(CountBody))
    async def count(request: Request) -> Json:
        return {"input_tokens": len(await tokens(await read_body(request, CountBody, max_body_bytes)))}

    return routes


class MessageAnswer:
    """A `message`, whole or as message_start, content_block_start, content_block_delta ..., content_block_stop, ..., message_delta, message_stop.

    Of the prompt's tokens `input_tokens` are those that were computed, `cache_read_input_tokens` those that were already there.
    """

    def __init__(self, message_id: str, model: str, request: EngineRequest, parts: Parts) -> None:
        self._request = request
        self._parts = parts
        self._output_tokens = 0
        self._stop: Json = {"stop_reason": None, "stop_sequence": None}
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._begun = False

    def add(self, choice: int, event: Event) -> None:
        self._advance(event)

    def _advance(self, event: Event) -> list[Step]:
        self._output_tokens += event.token is not None
        steps = self._parts.add(event)
        if event.finish_reason is not None:
            stop = self._request.text.stop_string if self._request.text is not None else None
            ended = "tool_use" if self._parts.called else "end_turn"
            reason = "stop_sequence" if stop is not None else "max_tokens" if event.finish_reason == "length" else ended
            self._stop = {"stop_reason": reason, "stop_sequence": stop}
        return steps

    def result(self) -> Json:
        return {**self._head, "content": [_block(part, part.text) for part in self._parts.all], **self._stop, "usage": self._usage()}

    def _usage(self) -> Json:
        cached = self._request.reused
        return {
            "input_tokens": len(self._request.prompt) - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self._output_tokens,
        }

    def begin(self) -> bytes:
        return b""  # how much of the prompt was there already is known with the first token

    def event(self, choice: int, event: Event) -> bytes:
        frames: list[Json] = []
        if not self._begun:
            self._begun = True
            message = {**self._head, "content": [], **self._stop, "usage": self._usage()}
            frames.append({"type": "message_start", "message": message})
        frames += map(_frame, self._advance(event))
        if event.finish_reason is not None:
            frames.append({"type": "message_delta", "delta": self._stop, "usage": self._usage()})
            frames.append({"type": "message_stop"})
        return b"".join(map(named_frame, frames))

    def end(self) -> bytes:
        return b""  # the last event said so

    def failed(self, error: APIError) -> bytes:
        return named_frame(anthropic_body(error))


def _frame(step: Step) -> Json:
    index = step.part.index
    if isinstance(step, Begun):
        return {"type": "content_block_start", "index": index, "content_block": _block(step.part, "")}
    if isinstance(step, Ended):
        return {"type": "content_block_stop", "index": index}
    if step.part.call is None:
        return {"type": "content_block_delta", "index": index, "delta": {"type": "text_delta", "text": step.text}}
    return {"type": "content_block_delta", "index": index, "delta": {"type": "input_json_delta", "partial_json": step.text}}


def _block(part: Part, text: str) -> Json:
    """A part of which `text` is known. The input of a call that is cut off is what there is of it, as Anthropic's client reads its pieces."""
    if part.call is None:
        return {"type": "text", "text": text}
    try:
        given = from_json(_LONE.sub(_replaced, text) or "{}", allow_partial="trailing-strings")
        json.dumps(given, allow_nan=False)
    except ValueError:
        raise APIError(
            500,
            f"the model called {part.call.name!r} with a number that is out of range: ask again, or bound it in the input_schema",
            type="server_error",
            code="unreadable_call",
        ) from None
    return {"type": "tool_use", "id": part.call.id.replace("call_", "toolu_", 1), "name": part.call.name, "input": given}


# A lone surrogate can be written in JSON, and sent in none: whole pairs and other escapes stay, it becomes U+FFFD.
_LONE = re.compile(r"\\u[dD][89abAB]..\\u[dD][c-fC-F]..|\\u[dD][89a-fA-F]..|\\.")


def _replaced(escape: re.Match[str]) -> str:
    found = escape.group()
    return "\\ufffd" if len(found) == 6 else found
