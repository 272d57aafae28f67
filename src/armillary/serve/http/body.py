"""A request's body: bounded before it is read, then JSON, then the fields that the endpoint knows."""

from __future__ import annotations

import asyncio
import contextlib
import difflib
import re
from collections.abc import Collection
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails, from_json
from starlette.requests import ClientDisconnect, Request

from armillary.serve.http.errors import APIError

READ_TIMEOUT_SECONDS = 60.0
MAX_DISCARDED_BYTES = 64 * 1024 * 1024  # of a body that is too large, and ...
MAX_DEPTH = 200  # of pydantic's JSON reader
DISCARD_SECONDS = 10.0  # ... for how long: a client that writes all before it reads then learns why it is refused
CLOSE = {"connection": "close"}  # the rest of a body that is not wanted is not read either


class Body(BaseModel):
    """A request body. Types are strict (no "5" for 5), numbers finite; a `null` field means its default.

    `UNSUPPORTED` maps a field of the OpenAI API that this server does not carry out to the values of it that ask
    for nothing, which are let through; `IGNORED` fields cannot change an answer and are named in the
    `x-armillary-ignored` response header.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {}
    IGNORED: ClassVar[frozenset[str]] = frozenset()

    _ignored: tuple[str, ...] = PrivateAttr(())

    @property
    def ignored(self) -> tuple[str, ...]:
        """Names of the given fields that change nothing here."""
        return self._ignored


AnyBody = TypeVar("AnyBody", bound=Body)


async def read_body(request: Request, schema: type[AnyBody], max_bytes: int) -> AnyBody:
    """Read, bound, parse and validate. Raises `APIError` 400, 408, 413 or 415."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Also what keeps a foreign web page from posting here without asking the browser first.
        raise APIError(
            415, f"content type is {kind or 'missing'!r:.80}: send application/json", code="unsupported_media_type", headers=CLOSE
        )
    return parse(await _read(request, max_bytes), schema)


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = APIError(413, f"the body is over this server's {max_bytes} bytes: send less", code="body_too_large", headers=CLOSE)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared[:20]) > max_bytes:
        await _discard(request)
        raise too_large
    chunks, size = [], 0
    try:
        async with asyncio.timeout(READ_TIMEOUT_SECONDS):
            async for chunk in request.stream():
                size += len(chunk)
                if size > max_bytes:
                    break
                chunks.append(chunk)
    except TimeoutError:
        raise APIError(
            408, f"the body did not arrive within {READ_TIMEOUT_SECONDS:g} s: send it faster", code="timeout", headers=CLOSE
        ) from None
    except ClientDisconnect:
        raise APIError(400, "the connection closed before the body was complete", code="client_disconnected") from None
    if size > max_bytes:
        chunks.clear()
        await _discard(request)
        raise too_large
    return b"".join(chunks)


async def _discard(request: Request) -> None:
    """Read on and keep nothing, within bounds: closing on a client that still writes resets the connection, and the answer is lost."""
    left = MAX_DISCARDED_BYTES
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(DISCARD_SECONDS):
            while left > 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):  # the end, or the client is gone
                    return


def parse(raw: bytes, schema: type[AnyBody]) -> AnyBody:
    """JSON bytes to a validated body."""
    try:
        raw.decode()
    except UnicodeDecodeError as error:
        raise APIError(400, f"the body is not valid UTF-8 at byte {error.start}: send UTF-8", code="invalid_utf8") from None
    try:
        data = from_json(raw, allow_inf_nan=False)
    except ValueError as error:
        if "recursion limit" in str(error):
            raise APIError(400, f"the body is nested deeper than {MAX_DEPTH} levels: make it flatter", code="nested_too_deep") from None
        raise APIError(400, f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(data, dict):
        raise APIError(400, f"the body is a JSON {_json_type(data)}: send an object", code="invalid_type")
    data = {name: value for name, value in data.items() if value is not None}
    known = {*schema.model_fields, *schema.UNSUPPORTED, *schema.IGNORED}
    for name in data:
        if name not in known:
            shown = name if len(name) <= 100 else name[:100] + "..."
            raise APIError(400, f"unknown field {shown!r}: {closest(name, known)}", param=shown, code="unknown_parameter")
    for name, harmless in schema.UNSUPPORTED.items():
        if name in data and data.pop(name) not in harmless:
            allowed = f" beyond {' or '.join(map(repr, harmless))}" if harmless else ""
            raise APIError(400, f"{name} is not supported by this server{allowed}: leave it out", param=name, code="unsupported_parameter")
    ignored = tuple(sorted(schema.IGNORED & data.keys()))
    for name in ignored:
        del data[name]
    try:
        body = schema.model_validate(data)
    except ValidationError as error:
        raise _as_api_error(error) from None
    body._ignored = ignored
    return body


def closest(name: str, known: Collection[str]) -> str:
    """`did you mean X?` for the nearest known name, or the fix when none is near."""
    near = difflib.get_close_matches(name[:100], known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else "leave it out"


_UNION = re.compile(r"[\[\](),]|^(str|int|float|bool|list|dict|[A-Z]\w*Choice)$|^constrained-")
_WORDS = {
    "model_type": "send an object",
    "model_attributes_type": "send an object",
    "dict_type": "send an object",
    "list_type": "send a list",
    "string_type": "send a string",
    "int_type": "send an integer",
    "float_type": "send a number",
    "bool_type": "send true or false",
}


def _nearest(errors: list[ErrorDetails]) -> ErrorDetails:
    """The first error; of a field that may be written in several ways, that of the way which comes closest."""
    first = errors[0]
    way = next((index for index, part in enumerate(first["loc"]) if _is_way(part)), None)
    if way is None:
        return first
    alternatives = [one for one in errors if one["loc"][:way] == first["loc"][:way]]
    return max(alternatives, key=lambda one: (len(one["loc"]), one["type"] not in _WORDS and one["type"] != "literal_error"))


def _is_way(part: int | str) -> bool:
    """Whether it is pydantic's name for one of the ways in which a field may be written."""
    return isinstance(part, str) and _UNION.search(part) is not None


def _as_api_error(error: ValidationError) -> APIError:
    first = _nearest(error.errors(include_url=False, include_context=True))
    param = ""
    for part in first["loc"]:
        if _is_way(part):
            continue
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    param = param[:200]
    cause = (first.get("ctx") or {}).get("error")
    message = str(cause) if isinstance(cause, ValueError) else _WORDS.get(first["type"], first["msg"])
    if first["type"] == "extra_forbidden":
        return APIError(400, f"unknown field {param!r}: leave it out", param=param, code="unknown_parameter")
    given = f" (got {_show(first['input'])})" if first["type"] != "missing" else ""
    code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
    return APIError(400, f"{param or 'body'}: {message}{given}", param=param or None, code=code)


def _show(value: object) -> str:
    if isinstance(value, dict | list | str) and len(value) > 40:
        return f"a JSON {_json_type(value)} of length {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."


def _json_type(value: object) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return kinds.get(type(value), "number")
