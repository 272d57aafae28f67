"""The items of the Responses API's `input`: messages, calls of functions and what the functions gave back."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from armillary.core.errors import InputError

Json = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant")
TEXT_PARTS = ("input_text", "output_text", "text")
REPLAYED = ("id", "status", "phase")  # what a server wrote into an item that a client sends back: accepted, not read
MAX_NAME = 256
MAX_CALL_ID = 128


def item(index: int, given: Any) -> Json:
    """`input[index]` checked and in one form. Raises ValueError, naming the item, for what a text model cannot take."""
    if not isinstance(given, dict):
        raise ValueError(f'item {index} is not an object like {{"role": "user", "content": "..."}}')
    kind = given.get("type", "message" if "role" in given else None)
    if kind == "message":
        return _message(index, given)
    if kind == "function_call":
        _only(index, given, ("type", "call_id", "name", "arguments", *REPLAYED))
        call = {
            name: _text(index, given, name, limit) for name, limit in (("call_id", MAX_CALL_ID), ("name", MAX_NAME), ("arguments", None))
        }
        if not _is_object(call["arguments"]):
            raise ValueError(f"item {index}: arguments are no JSON object: send back what the model wrote")
        return {"type": "function_call", **call}
    if kind == "function_call_output":
        _only(index, given, ("type", "call_id", "output", *REPLAYED))
        return {
            "type": "function_call_output",
            "call_id": _text(index, given, "call_id", MAX_CALL_ID),
            "output": _joined(index, given.get("output"), "output"),
        }
    raise ValueError(
        f"item {index} is of type {str(kind)[:40]!r}, which is not supported by this server: "
        "send message, function_call or function_call_output"
    )


def _message(index: int, given: Json) -> Json:
    _only(index, given, ("type", "role", "content", *REPLAYED))
    role = given.get("role")
    if role not in ROLES:
        raise ValueError(f"item {index} has the role {str(role)[:40]!r}: one of {', '.join(ROLES)}")
    return {"type": "message", "role": role, "content": _joined(index, given.get("content"), "content")}


def _joined(index: int, value: Any, name: str) -> str:
    """A string, or text parts joined by newlines as chat templates join them."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError(f"item {index}: {name} must be a string or a list of text parts")
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in TEXT_PARTS:
            raise ValueError(f"item {index}: part {number} of {name} is of type {str(kind)[:40]!r}: this model reads only text parts")
        if not isinstance(part.get("text"), str) or part.keys() - {"type", "text", "annotations", "logprobs"}:
            raise ValueError(f'item {index}: part {number} of {name} must be {{"type": "{kind}", "text": "..."}}')
        texts.append(part["text"])
    return "\n".join(texts)


def _text(index: int, given: Json, name: str, limit: int | None) -> str:
    value = given.get(name)
    if not isinstance(value, str) or not value or (limit is not None and len(value) > limit):
        bound = f" of at most {limit} characters" if limit is not None else ""
        raise ValueError(f"item {index}: {name} must be a string{bound}, not empty")
    return value


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _only(index: int, given: Json, known: tuple[str, ...]) -> None:
    for name in given.keys() - set(known):
        if given[name] is not None:
            raise ValueError(f"item {index}: unknown field {str(name)[:100]!r}")


def conversation(items: Sequence[Json], instructions: str | None = None) -> list[Json]:
    """Items as chat messages: OpenAI's `developer` is its newer name for `system`; calls join the assistant's turn before them.

    Raises InputError for the output of a call that was never made.
    """
    calls: set[str] = set()
    messages: list[Json] = [{"role": "system", "content": instructions}] if instructions else []
    for one in items:
        if one["type"] == "message":
            messages.append({"role": "system" if one["role"] == "developer" else one["role"], "content": one["content"]})
        elif one["type"] == "function_call":
            if not messages or messages[-1]["role"] != "assistant":
                messages.append({"role": "assistant", "content": ""})
            call = {"id": one["call_id"], "type": "function", "function": {"name": one["name"], "arguments": one["arguments"]}}
            messages[-1].setdefault("tool_calls", []).append(call)
            calls.add(one["call_id"])
        elif one["call_id"] not in calls:
            raise InputError(
                f"input: there is an output of the call {one['call_id']!r}, which nothing before it has made",
                "send the function_call first, or continue the response that made it (previous_response_id)",
                field="input",
            )
        else:
            messages.append({"role": "tool", "tool_call_id": one["call_id"], "content": one["output"]})
    return messages
