"""Conversations with tools, as a chat template can render them: through its own words for tools, or through ours where it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from armillary.core.errors import InputError
from armillary.models.chat_template import ChatTemplate
from armillary.serve.tools.definitions import Tool
from armillary.serve.tools.formats import CallFormat

_MARK = "armillary_marked_tool"
Message = Mapping[str, Any]


def reads_tools(template: ChatTemplate) -> bool:
    """Whether a template writes anything about the tools that it is given."""
    try:
        text = template.render([{"role": "user", "content": "a"}], tools=[Tool(_MARK, _MARK).as_openai()])
    except InputError:
        return False
    return _MARK in text


def for_template(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """History for a template that knows tools: it wants arguments as an object, where the API has their JSON text."""
    rendered = []
    for message in messages:
        calls = [{**call, "function": {**call["function"], "arguments": _arguments(call)}} for call in message.get("tool_calls") or ()]
        rendered.append({**message, "content": message.get("content") or "", **({"tool_calls": calls} if calls else {})})
    return rendered


def for_plain_template(messages: Sequence[Message], tools: Sequence[Tool], row: CallFormat) -> list[dict[str, Any]]:
    """History for a template that knows none: the tools are told in the system message, calls are the assistant's text as `row`
    writes them, and results come from the user."""
    rendered: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "tool":
            result = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
            if rendered and rendered[-1].get("result"):
                rendered[-1]["content"] += f"\n{result}"
            else:
                rendered.append({"role": "user", "content": result, "result": True})
            continue
        calls = written([(call["function"]["name"], _arguments(call)) for call in message.get("tool_calls") or ()], row)
        content = "\n".join(part for part in (message.get("content") or "", calls) if part)
        rendered.append({**{key: value for key, value in message.items() if key != "tool_calls"}, "content": content})
    plain = [{key: value for key, value in message.items() if key not in ("result", "tool_call_id")} for message in rendered]
    if not tools:
        return plain
    told = instructions(tools, row)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{told}"}, *plain[1:]]
    return [{"role": "system", "content": told}, *plain]


def instructions(tools: Sequence[Tool], row: CallFormat) -> str:
    """What a model is told that was not taught by its template, in the words of Hermes and Qwen."""
    listed = "\n".join(json.dumps(tool.as_openai(), ensure_ascii=False) for tool in tools)
    if row.syntax == "python":
        how, example = "call it in Python's syntax, with named arguments", "[<function-name>(<argument>=<value>)]"
    else:
        how = "return a json object with function name and arguments"
        example = f'{{"{row.name_field}": <function-name>, "{row.arguments_field}": <args-json-object>}}'
        example = f"{row.start}{row.opening}{example}{row.closing}{row.end}"
    return (
        "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
        f"You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n{listed}\n</tools>\n\n"
        f"For each function call, {how}, like this:\n{example}"
    )


def written(calls: Sequence[tuple[str, Mapping[str, Any]]], row: CallFormat) -> str:
    """Calls as the model itself would have written them; empty for none."""
    if not calls:
        return ""
    if row.syntax == "python":
        each = [f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})" for name, arguments in calls]
    else:
        each = [json.dumps({row.name_field: name, row.arguments_field: arguments}, ensure_ascii=False) for name, arguments in calls]
    if not row.together:
        each = [f"{row.start}{call}{row.end}" for call in each]
        return row.separator.join(each)
    return f"{row.start}{row.opening}{row.separator.join(each)}{row.closing}{row.end}"


def _arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call in the history, which must be an object's JSON."""
    text = call["function"]["arguments"]
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise InputError(
            f"the arguments of call {str(call.get('id'))[:64]!r} are no JSON object", "send back what the model wrote", field="messages"
        )
    return value
