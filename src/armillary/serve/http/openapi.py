"""What /openapi.json says beyond the paths: errors as they are, streams, and the key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from armillary.serve.http.errors import ANTHROPIC_PATH

Json = dict[str, Any]
_TEXT: Json = {"type": "string"}
_TEXT_OR_NULL: Json = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR: Json = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {"message": _TEXT, "type": _TEXT, "param": _TEXT_OR_NULL, "code": _TEXT_OR_NULL},
            "additionalProperties": False,
        }
    },
    "additionalProperties": False,
}
ANTHROPIC_ERROR: Json = {
    "type": "object",
    "required": ["type", "error"],
    "properties": {
        "type": {"const": "error"},
        "error": {"type": "object", "required": ["type", "message"], "properties": {"type": _TEXT, "message": _TEXT}},
    },
}


def describe(app: FastAPI, *, keys: bool) -> None:
    """Let `app` describe itself as it behaves. `keys`: whether clients need one."""

    def schema() -> Json:
        if app.openapi_schema is None:
            app.openapi_schema = _as_it_is(get_openapi(title=app.title, version=app.version, routes=app.routes), keys)
        return app.openapi_schema

    app.openapi = schema  # type: ignore[method-assign]


def _as_it_is(schema: Json, keys: bool) -> Json:
    """FastAPI documents a 422 of its own for parameters, which here are 400 like every other bad input."""
    components = schema.setdefault("components", {})
    components["schemas"] = {"Error": ERROR, "AnthropicError": ANTHROPIC_ERROR}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operation in _operations(schema):
        name = "AnthropicError" if path.startswith(ANTHROPIC_PATH) else "Error"
        error = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
        answers: Json = operation["responses"]
        answers.pop("422", None)
        answers["4XX"] = {"description": "What is wrong with the request, or too much of it", "content": error}
        answers["5XX"] = {"description": "What is wrong with the server", "content": error}
        if "stream" in _body(operation).get("properties", {}):
            answers["200"]["content"]["text/event-stream"] = {}
        if keys and path != "/health":
            operation["security"] = [{"key": []}]
    return schema


def _operations(schema: Json) -> Iterator[tuple[str, Json]]:
    for path, methods in schema["paths"].items():
        for operation in methods.values():
            yield path, operation


def _body(operation: Json) -> Json:
    body: Json = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    return body
