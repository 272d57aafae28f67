"""How models write a tool call: one row a family. A new family is a new row.

A call is written `start` + `opening` + calls joined by `separator` + `closing` + `end`; each call by itself where `together` is false,
all within one pair of tags where it is true. In JSON a call is `{"name": ..., "arguments": {...}}` under the row's field names;
in Python it is `name(argument=value)`. A row without tags is read only where the answer begins with a call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from armillary.core.errors import NotFoundError


@dataclass(frozen=True, slots=True)
class CallFormat:
    name: str
    syntax: Literal["json", "python"]
    start: str
    end: str
    separator: str = "\n"
    opening: str = ""
    closing: str = ""
    together: bool = False
    name_field: str = "name"
    arguments_field: str = "arguments"
    template_marks: tuple[str, ...] = ()  # in a chat template's source: it writes calls this way


FORMATS = (
    CallFormat("hermes", "json", "<tool_call>\n", "\n</tool_call>", template_marks=('<tool_call>\\n{"name"', '<tool_call>\\n{\\"name')),
    CallFormat("tagged-list", "json", "<tool_call>", "</tool_call>", ", ", "[", "]", together=True, template_marks=("<tool_call>[",)),
    CallFormat("granite", "json", "<|tool_call|>", "", ", ", "[", "]", together=True, template_marks=("<|tool_call|>",)),
    CallFormat("llama-json", "json", "", "", "; ", arguments_field="parameters", template_marks=('"parameters": ', '"parameters":')),
    CallFormat("pythonic", "python", "", "", ", ", "[", "]", together=True, template_marks=("[func_name1(params_name1=",)),
)
DEFAULT = FORMATS[0]  # what is asked for where the template says nothing of tools


def get(name: str) -> CallFormat:
    for row in FORMATS:
        if row.name == name:
            return row
    raise NotFoundError(
        f"there is no tool format {name!r}", f"choose auto or one of {', '.join(row.name for row in FORMATS)}", field="tool_format"
    )


def of_template(source: str) -> CallFormat:
    """The first row whose marks are in a chat template's source; the default where none is."""
    for row in FORMATS:
        if any(mark in source for mark in row.template_marks):
            return row
    return DEFAULT
