"""A grammar that lets an answer be nothing but valid calls, or text in which every call is valid."""

from __future__ import annotations

import json
from keyword import iskeyword
from typing import Any

from armillary.core.errors import InputError
from armillary.serve.grammar.grammar import MAX_WHITESPACE, Grammar, structural_tag
from armillary.serve.grammar.json_schema import followed
from armillary.serve.tools.definitions import Tool, Toolbox
from armillary.serve.tools.formats import CallFormat


def call_begin(row: CallFormat, name: str) -> str:
    """How a constrained call of this tool begins in JSON, up to its arguments; without the row's tag where all calls share one."""
    tag = "" if row.together else row.start
    return f"{tag}{{{json.dumps(row.name_field)}: {json.dumps(name)}, {json.dumps(row.arguments_field)}: "


def call_end(row: CallFormat) -> str:
    return "}" + ("" if row.together else row.end)


def constraint(toolbox: Toolbox, row: CallFormat) -> Grammar | None:
    """The grammar that the toolbox asks for; None where the model may write what it likes.

    Under `auto` only tools that are `strict`, or calls that may not be parallel, need one. Raises InputError for parameters
    that cannot be followed, and names their place.
    """
    forced = toolbox.choice == "required"
    if not forced and toolbox.parallel and not any(tool.strict for tool in toolbox.tools):
        return None
    calls = [_call(tool, f"tools[{toolbox.tools.index(tool)}].{toolbox.schema_field}", row) for tool in toolbox.callable]
    listed = {
        "type": "tags_with_separator",
        "tags": calls,
        "separator": row.separator,
        "at_least_one": True,
        "stop_after_first": not toolbox.parallel,
    }
    if row.together:
        whole: dict[str, Any] = {"type": "tag", "begin": row.start + row.opening, "content": listed, "end": row.closing + row.end}
    else:
        whole = listed
    if forced:
        return structural_tag(whole, field="tools")
    if not row.start:
        raise InputError(
            f"the {row.name} way of writing calls has no tag that tells a call from text",
            "leave strict out and allow parallel calls, or require a call (tool_choice)",
            field="tool_choice",
        )
    return structural_tag(
        {
            "type": "triggered_tags",
            "triggers": [row.start.strip()],
            "tags": [whole] if row.together else calls,
            "stop_after_first": not toolbox.parallel,
        },
        field="tools",
    )


def _call(tool: Tool, field: str, row: CallFormat) -> dict[str, Any]:
    schema = followed(dict(tool.parameters), field)
    if schema.get("type") != "object":
        raise InputError(f"the parameters of {tool.name!r} are no object", 'give a schema of type "object"', field=field)
    if row.syntax == "python":
        return _python_call(tool.name, schema)
    return {
        "type": "tag",
        "begin": call_begin(row, tool.name),
        "content": {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MAX_WHITESPACE},
        "end": call_end(row),
    }


def _python_call(name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """`name(a=1, b="x")` with JSON's values: the required ones first, then the others that are given, in order."""
    if schema["additionalProperties"] is not False:
        raise InputError(
            f"{name!r} takes any arguments, which a call in Python's syntax cannot be held to", "name its properties", field="tools"
        )
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    required = schema.get("required", [])
    properties = schema.get("properties", {})
    names = [*required, *(one for one in properties if one not in required)]
    for one in (*name.split("."), *names):
        if not one.isidentifier() or iskeyword(one):
            raise InputError(f"{one!r} cannot be written in Python's syntax", "rename it to an identifier", field="tools")

    def given(argument: str, before: str) -> dict[str, Any]:
        value = {"type": "json_schema", "json_schema": {**properties[argument], **shared}, "max_whitespace_cnt": MAX_WHITESPACE}
        return {"type": "sequence", "elements": [{"type": "const_string", "value": f"{before}{argument}="}, value]}

    def rest(after: int) -> list[dict[str, Any]]:
        following = names[after:]
        return [given(one, ", ") if one in required else {"type": "optional", "content": given(one, ", ")} for one in following]

    starts = [{"type": "sequence", "elements": [given(one, ""), *rest(index + 1)]} for index, one in enumerate(names)]
    content: dict[str, Any]
    if required:
        content = starts[0]
    elif starts:
        content = {"type": "optional", "content": {"type": "or", "elements": starts}}
    else:
        content = {"type": "const_string", "value": ""}
    return {"type": "tag", "begin": f"{name}(", "content": content, "end": ")"}
