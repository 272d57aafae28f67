"""`/v1/embeddings` and `/rerank`: vectors, and documents in the order of their likeness to a query."""

from __future__ import annotations

import asyncio
import base64
import secrets
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import torch
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic_core import to_json
from starlette.types import Receive

from armillary.core.errors import InputError
from armillary.serve.embedder import Embedder
from armillary.serve.http.body import Body, read_body
from armillary.serve.http.endpoints import documented, ignored
from armillary.serve.http.errors import APIError
from armillary.serve.http.off_loop import off_loop
from armillary.serve.http.schemas.embeddings import EmbeddingsBody, RerankBody
from armillary.serve.service import ContextError

Json = dict[str, Any]
T = TypeVar("T")
RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")  # vLLM's and Jina's, and Cohere's


def router(embedder: Embedder, max_body_bytes: int) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/embeddings", openapi_extra=documented(EmbeddingsBody))
    async def embeddings(request: Request) -> Response:
        body = await read_body(request, EmbeddingsBody, max_body_bytes)
        _check_model(embedder, body.model)
        if body.dimensions not in (None, embedder.dimensions):
            raise InputError(
                f"dimensions is {body.dimensions}; vectors of {embedder.model_name} have {embedder.dimensions}, "
                "and it was not trained for shorter ones",
                "leave it out",
                field="dimensions",
            )
        size = sum(len(one) for one in body.input)
        inputs = await off_loop(size, lambda: [_tokens(embedder, one, index) for index, one in enumerate(body.input)])
        vectors = await while_connected(request.receive, embedder.embed(inputs))
        count = sum(map(len, inputs))
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(one) if body.encoding_format == "base64" else one.tolist()}
            for index, one in enumerate(vectors)
        ]
        usage = {"prompt_tokens": count, "total_tokens": count}
        return _json({"object": "list", "data": data, "model": embedder.model_name, "usage": usage}, body)

    async def rerank(request: Request) -> Response:
        body = await read_body(request, RerankBody, max_body_bytes)
        _check_model(embedder, body.model)
        texts = [body.query, *body.documents]
        names = ["query", *(f"documents[{index}]" for index in range(len(body.documents)))]
        inputs = await off_loop(
            sum(map(len, texts)),
            lambda: [_fit(embedder, embedder.text_tokens(text), name) for text, name in zip(texts, names, strict=True)],
        )
        query, *documents = await while_connected(request.receive, embedder.embed(inputs))
        scores = torch.cosine_similarity(torch.stack(documents), query.unsqueeze(0)).tolist()
        best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
        results: list[Json] = [{"index": index, "relevance_score": scores[index]} for index in best]
        if body.return_documents:
            for result in results:
                result["document"] = {"text": body.documents[result["index"]]}
        usage = {"prompt_tokens": sum(map(len, inputs)), "total_tokens": sum(map(len, inputs))}
        return _json({"id": f"rerank-{secrets.token_hex(12)}", "model": embedder.model_name, "results": results, "usage": usage}, body)

    for path in RERANK_PATHS:
        routes.post(path, openapi_extra=documented(RerankBody), include_in_schema=path == RERANK_PATHS[1])(rerank)
    return routes


async def while_connected(receive: Receive, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes away."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, watcher = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise APIError(499, "the connection closed before the answer was complete", code="client_disconnected")
        return await task
    finally:
        task.cancel()
        watcher.cancel()


def _check_model(embedder: Embedder, name: str | None) -> None:
    embedder.check_model(name)
    if name not in (None, embedder.model_name):
        raise InputError(f"{name!r} is an adapter, which gives no embeddings", f"ask for {embedder.model_name!r}", field="model")


def _tokens(embedder: Embedder, given: str | Sequence[int], index: int) -> tuple[int, ...]:
    if isinstance(given, str):
        if not given:
            raise InputError(f"input {index} is empty", "leave it out, or send a text", field="input")
        tokens = embedder.text_tokens(given)
    else:
        tokens = embedder.check_tokens(given, "input")
    return _fit(embedder, tokens, f"input[{index}]")


def _fit(embedder: Embedder, tokens: tuple[int, ...], name: str) -> tuple[int, ...]:
    """Nothing is cut: too many tokens are a ContextError with both numbers."""
    if not tokens:
        raise InputError(f"{name} has no tokens", "leave it out, or send a text", field=name.partition("[")[0])
    if len(tokens) > embedder.max_input_tokens:
        raise ContextError(
            f"{name} has {len(tokens)} tokens; {embedder.model_name} is served for at most {embedder.max_input_tokens}",
            f"shorten or split it, or {embedder.longer}",
            field=name.partition("[")[0],
        )
    return tokens


def _base64(vector: torch.Tensor) -> str:
    """Little-endian float32, as OpenAI's clients read it."""
    return base64.b64encode(vector.float().numpy().astype("<f4").tobytes()).decode()


def _json(value: Json, body: Body) -> Response:
    return Response(to_json(value), media_type="application/json", headers=ignored(body))
