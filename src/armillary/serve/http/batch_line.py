"""A line of a batch: what it asks of which endpoint, and the line that answers it. The endpoint is the server's own, called in this process."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pydantic_core import from_json, to_json
from starlette.types import ASGIApp, Message

from armillary.serve.http.errors import APIError

Json = dict[str, Any]

MAX_LINES = 50_000  # OpenAI's bound
MAX_LINE_BYTES = 4 * 1024 * 1024
MAX_CUSTOM_ID = 512
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings", "/v1/rerank")
RETRY_SECONDS = 0.5


class LineError(ValueError):
    """A line that is no request; `param` is its field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


@dataclass(frozen=True, slots=True)
class Line:
    custom_id: str
    url: str
    body: bytes


def parse_line(raw: bytes, endpoints: Collection[str] = ENDPOINTS) -> Line:
    """Raises LineError for what is not `{"custom_id", "method": "POST", "url", "body"}`, or whose answer would not be one JSON object."""
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(f"the line has {len(raw):,} bytes; at most {MAX_LINE_BYTES:,} are read")
    try:
        given = from_json(raw, allow_inf_nan=False)  # as a body is read, so that what it takes can be written again
    except ValueError as error:
        raise LineError(f"the line is not JSON ({str(error)[:80]})") from None
    if not isinstance(given, dict):
        raise LineError("the line is not a JSON object")
    for name in given.keys() - {"custom_id", "method", "url", "body"}:
        raise LineError(f"unknown field {str(name)[:100]!r}", str(name)[:100])
    custom_id, body = given.get("custom_id"), given.get("body")
    if not isinstance(custom_id, str) or not 1 <= len(custom_id) <= MAX_CUSTOM_ID:
        raise LineError(f"custom_id must be a string of 1 to {MAX_CUSTOM_ID} characters", "custom_id")
    if given.get("method", "POST") != "POST":
        raise LineError("method must be POST", "method")
    if given.get("url") not in endpoints:
        raise LineError(f"url must be {' or '.join(endpoints)}", "url")
    if not isinstance(body, dict):
        raise LineError("body must be an object", "body")
    for name in ("stream", "background"):
        if body.get(name):
            raise LineError(f"{name} is not possible in a batch: leave it out", f"body.{name}")
    return Line(custom_id, given["url"], to_json(body))


def parse_lines(content: bytes, endpoints: Collection[str] = ENDPOINTS) -> tuple[list[Line], list[Json]]:
    """All lines, or what is wrong with the first hundred bad ones, as OpenAI's batch errors. Blank lines are passed over."""
    lines: list[Line] = []
    problems: list[Json] = []
    seen: set[str] = set()
    for number, raw in enumerate(content.splitlines(), 1):
        if not raw.strip():
            continue
        try:
            line = parse_line(raw, endpoints)
            if line.custom_id in seen:
                raise LineError(f"custom_id {line.custom_id[:100]!r} is given twice", "custom_id")
            if len(lines) == MAX_LINES:
                raise LineError(f"a batch has at most {MAX_LINES:,} lines")
            seen.add(line.custom_id)
            lines.append(line)
        except LineError as error:
            problems.append({"code": "invalid_request", "message": str(error), "line": number, "param": error.param})
            if len(problems) == 100 or len(lines) == MAX_LINES:
                break
    if not lines and not problems:
        problems.append({"code": "empty_file", "message": "the file has no line", "line": None, "param": None})
    return lines, problems


async def post(app: ASGIApp, path: str, body: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of what `app` answers; cancelling this cancels the request as a client that leaves does."""
    given = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http", "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": given, "client": None, "server": None,
    }  # fmt: skip
    read = False
    status, headers, parts = 500, {}, []

    async def receive() -> Message:
        nonlocal read
        if read:
            await asyncio.Event().wait()  # a client that stays
        read = True
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Message) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status = message["status"]
            headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in message["headers"]}
        else:
            parts.append(message.get("body", b""))

    try:
        await app(scope, receive, send)
    except Exception:  # a defect, logged: it is raised again for a server to see after a 500 has been sent
        if not parts:
            raise
    return status, headers, json.loads(b"".join(parts))


async def answer_line(app: ASGIApp, line: Line) -> Json:
    """The line's result, as OpenAI writes it. What is refused for now (429, 503) is asked again until there is room."""
    while True:
        status, headers, body = await post(app, line.url, line.body)
        if status not in (429, 503):
            break
        wait = headers.get("retry-after", "")
        await asyncio.sleep(min(float(wait), 60.0) if wait.replace(".", "", 1).isdigit() else RETRY_SECONDS)
    response = {"status_code": status, "request_id": headers.get("x-request-id", ""), "body": body}
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": response, "error": None}


def unanswered(line: Line, code: str, message: str) -> Json:
    """The result of a line that was not carried out."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{secrets.token_hex(12)}", "custom_id": line.custom_id, "response": None, "error": error}


def succeeded(result: Json) -> bool:
    return result["response"] is not None and result["response"]["status_code"] == 200


def check_endpoint(endpoint: str, endpoints: Collection[str]) -> None:
    if endpoint not in endpoints:
        raise APIError(400, f"endpoint {endpoint[:100]!r} takes no batches: {', '.join(endpoints)}", param="endpoint", code="invalid_value")
