"""Calls of tools in a conversation, written so that the model's own template shows them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

Json = dict[str, Any]


def for_template(messages: Sequence[Json], template: str | None) -> list[Json]:
    """Messages whose `tool_calls` the template's source knows, with arguments as objects as templates want them.

    A template that does not know them would drop them in silence: for it they become part of the text, as Hermes models write them.
    """
    return [_turn(message, template is not None and "tool_calls" in template) for message in messages]


def _turn(message: Json, known: bool) -> Json:
    if "tool_calls" not in message:
        return message
    calls = [{"name": call["function"]["name"], "arguments": _arguments(call["function"]["arguments"])} for call in message["tool_calls"]]
    if known:
        given = [{**call, "function": function} for call, function in zip(message["tool_calls"], calls, strict=True)]
        return {**message, "tool_calls": given}
    written = [f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>" for call in calls]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return {**rest, "content": "\n".join([*([message["content"]] if message["content"] else []), *written])}


def _arguments(text: str) -> Any:
    """The object that the JSON says; what is no JSON object stays as it was written."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text
