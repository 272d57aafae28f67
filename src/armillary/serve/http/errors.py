"""Every failure as an error body with the right status: OpenAI's, or Anthropic's below its own endpoint."""

from __future__ import annotations

import errno
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from armillary.core.errors import ArmillaryError, CapacityError, InputError, MissingDependencyError, NotFoundError
from armillary.serve.operations.refusal import Refused
from armillary.serve.service import ContextError

log = logging.getLogger("armillary.http")

RETRY_AFTER_SECONDS = 1
ANTHROPIC_PATH = "/v1/messages"


class APIError(Exception):
    """An answer that is an error: `{"error": {message, type, param, code}}`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body: dict[str, Any] = {"error": {"message": message, "type": type, "param": param, "code": code}}
        self.headers = dict(headers or {})

    def response(self, path: str = "") -> JSONResponse:
        """The answer to a request of `path`: in OpenAI's shape, or in Anthropic's below its own endpoint."""
        body = anthropic_body(self) if path.startswith(ANTHROPIC_PATH) else self.body
        return JSONResponse(body, self.status, headers=self.headers)


def anthropic_body(error: APIError) -> dict[str, Any]:
    """`{"type": "error", "error": {type, message}}`, with Anthropic's name for the status."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large"}
    kinds |= {408: "timeout_error", 429: "rate_limit_error", 503: "overloaded_error", 529: "overloaded_error"}
    kind = kinds.get(error.status, "api_error" if error.status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.body["error"]["message"]}}


def as_api_error(error: BaseException) -> APIError:
    """Any exception as the answer it deserves. What is unexpected is logged and told to the client only in general words."""
    if isinstance(error, APIError):
        return error
    if isinstance(error, Refused):
        kind = "overloaded_error" if error.code == "overloaded" else "rate_limit_error"
        return APIError(429, str(error), type=kind, code=error.code, headers={"Retry-After": str(error.retry_after)})
    if isinstance(error, CapacityError):
        return APIError(503, str(error), type="overloaded_error", code="over_capacity", headers={"Retry-After": str(RETRY_AFTER_SECONDS)})
    if isinstance(error, ContextError):
        return APIError(400, str(error), param=error.field, code="context_length_exceeded")
    if isinstance(error, InputError):
        return APIError(400, str(error), param=error.field, code="invalid_value")
    if isinstance(error, NotFoundError):
        return APIError(404, str(error), param=error.field, code="model_not_found" if error.field == "model" else "not_found")
    if isinstance(error, MissingDependencyError):
        return APIError(501, str(error), type="server_error", code="missing_dependency")
    if isinstance(error, ArmillaryError):
        return APIError(500, str(error), type="server_error", code="server_error")
    if isinstance(error, RequestValidationError):  # a path or query parameter; bodies are checked in `body`
        first = error.errors()[0]
        name = str(first["loc"][-1])
        return APIError(400, f"{name}: {first['msg']}", param=name, code="invalid_value")
    if isinstance(error, HTTPException):
        words = {404: "no such path: the API lives under /v1", 405: "this path does not answer that method"}
        codes = {404: "not_found", 405: "method_not_allowed"}
        code = codes.get(error.status_code, "http_error")
        return APIError(error.status_code, words.get(error.status_code, str(error.detail)), code=code, headers=error.headers)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("the disk is full: %s", error)
        return APIError(
            507,
            "the server's disk is full: delete files (DELETE /v1/files/ID), or have room made on it",
            type="server_error",
            code="disk_full",
        )
    log.error("request failed", exc_info=error)
    return APIError(500, "the server failed to answer this request: its log has the details", type="server_error", code="server_error")


def install(app: FastAPI) -> None:
    """Make every exception that leaves an endpoint an error body of the endpoint's own API."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return as_api_error(error).response(request.url.path)

    for kind in (APIError, ArmillaryError, RequestValidationError, HTTPException, OSError, Exception):
        app.add_exception_handler(kind, handle)
