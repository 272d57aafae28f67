"""The OpenAI endpoints: a body becomes requests of the service, their events become an answer."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from armillary.serve.http.answers import ChatAnswer, CompletionAnswer
from armillary.serve.http.body import Body, read_body
from armillary.serve.http.held_to import held_to, told
from armillary.serve.http.off_loop import off_loop
from armillary.serve.http.schemas.chat import ChatBody
from armillary.serve.http.schemas.completions import CompletionBody
from armillary.serve.http.schemas.tokens import DetokenizeBody, TokenizeBody
from armillary.serve.http.sse import ChunkWire, EventStream, whole
from armillary.serve.request import SamplingParams
from armillary.serve.service import Service
from armillary.serve.streams import AsyncStream


async def named(service: Service, model: str | None) -> Service:
    """The service under the name that a request gives, with its adapter in memory. Raises NotFoundError with the closest name."""
    service = service.named(model)
    if not service.ready:
        await asyncio.to_thread(service.prepare)
    return service


def router(service: Service, max_body_bytes: int) -> APIRouter:
    routes = APIRouter()
    created = int(service.started_at)

    def model_card(name: str) -> dict[str, Any]:
        parent = None if name == service.model_name else service.model_name  # of an adapter
        card = {"id": name, "object": "model", "created": created, "owned_by": "armillary", "max_model_len": service.context}
        return card | {"parent": parent}

    @routes.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model_card(name) for name in (service.model_name, *service.adapters)]}

    @routes.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        service.check_model(model_id)
        return model_card(model_id)

    @routes.post("/v1/chat/completions", openapi_extra=documented(ChatBody))
    async def chat(request: Request) -> Response:
        arrival = service.engine.clock.now()
        body = await read_body(request, ChatBody, max_body_bytes)
        served = await named(service, body.model)
        messages, toolbox = [message.for_template() for message in body.messages], body.toolbox
        size = sum(len(message.content) for message in body.messages) + told(toolbox)
        prompt = await off_loop(size, lambda: service.chat_tokens(messages, toolbox=toolbox))
        room = service.room(len(prompt), body.wanted_tokens, "messages")
        sampling = service.check_sampling(body.sampling(room, logprobs=body.wanted_logprobs))
        compiled = await held_to(service, body.grammar if body.structured else None, toolbox)
        answer = ChatAnswer(
            served,
            service.new_id("chatcmpl"),
            body.n,
            len(prompt),
            stream=body.stream,
            logprobs=body.logprobs,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
            toolbox=toolbox,
        )
        stream = served.start(
            answer.id,
            [prompt],
            [sampling],
            n=body.n,
            arrival=arrival,
            cache_salt=body.cache_salt or "",
            grammar=compiled,
            **body.turn(arrival),
        )
        return await _respond(request, body, stream, answer)

    @routes.post("/v1/completions", openapi_extra=documented(CompletionBody))
    async def completions(request: Request) -> Response:
        arrival = service.engine.clock.now()
        body = await read_body(request, CompletionBody, max_body_bytes)
        served = await named(service, body.model)
        size = sum(len(prompt) for prompt in body.prompt if isinstance(prompt, str))
        prompts, echoes = await off_loop(size, lambda: _prompts(service, body))
        sampling = service.check_sampling(body.sampling(0, logprobs=body.logprobs, prompt_logprobs=body.logprobs if body.echo else None))
        each: list[SamplingParams] = [replace(sampling, max_tokens=service.room(len(prompt), body.max_tokens)) for prompt in prompts]
        answer = CompletionAnswer(
            served,
            service.new_id("cmpl"),
            sum(map(len, prompts)),
            choices=len(prompts) * body.n,
            n=body.n,
            logprobs=body.logprobs is not None,
            echoes=[echo for echo in echoes for _ in range(body.n)] if body.echo else None,
            include_usage=body.stream_options is not None and body.stream_options.include_usage,
        )
        compiled = await held_to(service, body.grammar if body.structured else None)
        stream = served.start(
            answer.id, prompts, each, n=body.n, arrival=arrival, cache_salt=body.cache_salt or "", grammar=compiled, **body.turn(arrival)
        )
        return await _respond(request, body, stream, answer)

    @routes.post("/tokenize", openapi_extra=documented(TokenizeBody))
    async def tokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, TokenizeBody, max_body_bytes)
        service.check_model(body.model)

        def tokens() -> tuple[int, ...]:
            if body.messages is not None:
                return service.chat_tokens([message.for_template() for message in body.messages])
            return service.text_tokens(body.prompt or "", add_special_tokens=body.add_special_tokens)

        ids = await off_loop(len(body.prompt or "") + sum(len(message.content) for message in body.messages or ()), tokens)
        strings = [service.tokenizer.token_text(token) for token in ids] if body.return_token_strs else None
        return {"count": len(ids), "max_model_len": service.context, "tokens": ids, "token_strs": strings}

    @routes.post("/detokenize", openapi_extra=documented(DetokenizeBody))
    async def detokenize(request: Request) -> dict[str, Any]:
        body = await read_body(request, DetokenizeBody, max_body_bytes)
        service.check_model(body.model)
        tokens = service.check_tokens(body.tokens, "tokens")
        return {"prompt": await off_loop(4 * len(tokens), lambda: service.tokenizer.decode(tokens, skip_special=False))}

    return routes


async def _respond(
    request: Request, body: ChatBody | CompletionBody, stream: AsyncStream, answer: ChatAnswer | CompletionAnswer
) -> Response:
    answer.requests = stream.requests
    headers = {"x-request-id": answer.id, **ignored(body)}
    return EventStream(stream, ChunkWire(answer), headers) if body.stream else await whole(request, stream, answer, headers)


def _prompts(service: Service, body: CompletionBody) -> tuple[list[tuple[int, ...]], list[str]]:
    """Each prompt as tokens, and as the text that `echo` gives back: for a string exactly that string."""
    prompts, echoes = [], []
    for prompt in body.prompt:
        if isinstance(prompt, str):
            prompts.append(service.text_tokens(prompt))
            echoes.append(prompt)
        else:
            tokens = service.check_tokens(prompt)
            prompts.append(tokens)
            echoes.append(service.tokenizer.decode(tokens, skip_special=False) if body.echo else "")
    return prompts, echoes


def ignored(body: Body) -> dict[str, str]:
    """The response header that names the fields which changed nothing."""
    return {"x-armillary-ignored": ", ".join(body.ignored)} if body.ignored else {}


def documented(schema: type[Body]) -> dict[str, Any]:
    """The body's JSON schema for /openapi.json, which FastAPI cannot see because the body is bounded before it is parsed."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": _inlined(schema.model_json_schema())}}}}


def _inlined(schema: dict[str, Any]) -> dict[str, Any]:
    definitions = schema.pop("$defs", {})

    def inline(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inline(definitions[node["$ref"].rpartition("/")[2]])
            return {key: inline(value) for key, value in node.items()}
        return [inline(value) for value in node] if isinstance(node, list) else node

    result: dict[str, Any] = inline(schema)
    return result
