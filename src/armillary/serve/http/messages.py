"""`/v1/messages`: the conversation in Anthropic's words, answered in them too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from armillary.serve.http.body import read_body
from armillary.serve.http.endpoints import documented, ignored, named
from armillary.serve.http.errors import APIError, anthropic_body
from armillary.serve.http.off_loop import off_loop
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
        size = sum(len(message["content"]) for message in messages) + len(prefill)
        return await off_loop(size, lambda: service.chat_tokens(messages, prefill=prefill))

    @routes.post("/v1/messages", openapi_extra=documented(MessagesBody))
    async def create(request: Request) -> Response:
        arrival = service.engine.clock.now()
        body = await read_body(request, MessagesBody, max_body_bytes)
        served = await named(service, body.model)
        prompt = await tokens(body)
        sampling = body.sampling(service.room(len(prompt), body.max_tokens, "messages"))
        message_id = service.new_id("msg")
        stream = served.start(message_id, [prompt], [sampling], arrival=arrival, cache_salt=body.cache_salt or "", **body.turn(arrival))
        answer = MessageAnswer(message_id, served.model_name, stream.requests[0])
        headers = {"request-id": message_id, "x-request-id": message_id, **ignored(body)}
        return EventStream(stream, answer, headers) if body.stream else await whole(request, stream, answer, headers)

    @routes.post("/v1/messages/count_tokens", openapi_extra=documented(CountBody))
    async def count(request: Request) -> Json:
        return {"input_tokens": len(await tokens(await read_body(request, CountBody, max_body_bytes)))}

    return routes


class MessageAnswer:
    """A `message`, whole or as message_start, content_block_start, content_block_delta ..., content_block_stop, message_delta, message_stop.

    Of the prompt's tokens `input_tokens` are those that were computed, `cache_read_input_tokens` those that were already there.
    """

    def __init__(self, message_id: str, model: str, request: EngineRequest) -> None:
        self._request = request
        self._texts: list[str] = []
        self._output_tokens = 0
        self._stop: Json = {"stop_reason": None, "stop_sequence": None}
        self._head = {"id": message_id, "type": "message", "role": "assistant", "model": model}
        self._begun = False

    def add(self, choice: int, event: Event) -> None:
        self._output_tokens += event.token is not None
        self._texts.append(event.text)
        if event.finish_reason is not None:
            stop = self._request.text.stop_string if self._request.text is not None else None
            reason = "stop_sequence" if stop is not None else "max_tokens" if event.finish_reason == "length" else "end_turn"
            self._stop = {"stop_reason": reason, "stop_sequence": stop}

    def result(self) -> Json:
        return {**self._head, "content": [{"type": "text", "text": "".join(self._texts)}], **self._stop, "usage": self._usage()}

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
            frames.append({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})
        self.add(choice, event)
        if event.text:
            frames.append({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": event.text}})
        if event.finish_reason is not None:
            frames.append({"type": "content_block_stop", "index": 0})
            frames.append({"type": "message_delta", "delta": self._stop, "usage": self._usage()})
            frames.append({"type": "message_stop"})
        return b"".join(map(named_frame, frames))

    def end(self) -> bytes:
        return b""  # the last event said so

    def failed(self, error: APIError) -> bytes:
        return named_frame(anthropic_body(error))
