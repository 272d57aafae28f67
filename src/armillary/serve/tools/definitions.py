"""What a caller lets a model call, and what the model has called."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from armillary.core.errors import InputError

MAX_TOOLS = 128


@dataclass(frozen=True, slots=True)
class Tool:
    """A function: `parameters` is the JSON schema of its arguments, `strict` asks that calls follow it even where calling is free."""

    name: str
    description: str = ""
    parameters: Mapping[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool = False

    def as_openai(self) -> dict[str, Any]:
        """As chat templates expect it."""
        return {"type": "function", "function": {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request. `choice`: the model may call (auto), must (required), must this one (`named`).

    A request whose model must not call has no toolbox. `schema_field` is what the API calls a tool's parameters, for errors; the
    tool's name stands beside them.
    """

    tools: tuple[Tool, ...]
    choice: Literal["auto", "required"] = "auto"
    named: str | None = None
    parallel: bool = True
    schema_field: str = "function.parameters"

    def __post_init__(self) -> None:
        if not 1 <= len(self.tools) <= MAX_TOOLS:
            raise InputError(f"{len(self.tools)} tools", f"send 1 to {MAX_TOOLS}", field="tools")
        names = [tool.name for tool in self.tools]
        for index, name in enumerate(names):
            if name in names[:index]:
                place = f"tools[{index}].{self.schema_field}".rpartition(".")[0]
                raise InputError(f"two tools are named {name!r}", "give each its own name", field=f"{place}.name")
        if self.named is not None and self.named not in names:
            raise InputError(
                f"tool_choice names {self.named[:64]!r}, which is not among the tools", "add it, or name another", field="tool_choice"
            )

    @property
    def callable(self) -> Sequence[Tool]:
        """The tools that may be called."""
        return [tool for tool in self.tools if self.named in (None, tool.name)]


@dataclass(frozen=True, slots=True)
class Call:
    """A call as the model wrote it: `arguments` is the JSON text of an object."""

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")
