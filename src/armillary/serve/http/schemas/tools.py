"""Functions that a model may call, as OpenAI's two APIs have them, and calls within a conversation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armillary.core.errors import InputError
from armillary.serve.http.body import Body
from armillary.serve.tools.definitions import MAX_TOOLS, Tool, Toolbox

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
Name = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


class ToolFunction(BaseModel):
    model_config = _STRICT
    name: Name
    description: str | None = Field(None, max_length=65_536)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        return Tool(self.name, self.description or "", self.parameters or {"type": "object", "properties": {}}, bool(self.strict))


class ToolBody(BaseModel):
    model_config = _STRICT
    type: Literal["function"]
    function: ToolFunction


class NamedFunction(BaseModel):
    model_config = _STRICT
    name: Name


class NamedChoice(BaseModel):
    model_config = _STRICT
    type: Literal["function"]
    function: NamedFunction


class _Choosing(Body):
    """A body with a `tool_choice`, in which a function is named as `named` shows."""

    named: ClassVar[str]

    @field_validator("tool_choice", mode="before", check_fields=False)
    @classmethod
    def _one_of(cls, value: Any) -> Any:
        if value in ("none", "auto", "required") or (isinstance(value, dict) and value.get("type") == "function"):
            return value
        raise ValueError(f'send "none", "auto", "required", or {cls.named}')


class ToolFields(_Choosing):
    """`tool_choice`: none, auto, required, or `{"type": "function", "function": {"name": ...}}`."""

    named = '{"type": "function", "function": {"name": "..."}}'
    tools: list[ToolBody] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def toolbox(self) -> Toolbox | None:
        """What may be called; None when nothing may."""
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        choice = self.tool_choice if isinstance(self.tool_choice, str) else "auto"
        return toolbox([one.function.tool() for one in self.tools], choice, named, self.parallel_tool_calls, "function.parameters")


class ResponseTool(ToolFunction):
    """A function as the Responses API has it: without an object of its own."""

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _function(cls, data: Any) -> Any:
        kind = data.get("type") if isinstance(data, dict) else "function"
        if kind != "function":
            raise ValueError(f"a tool of type {str(kind)[:40]!r} is not carried out by this server: send functions (type function)")
        return data


class ResponseChoice(NamedFunction):
    type: Literal["function"]


class ResponseToolFields(_Choosing):
    """`tool_choice`: none, auto, required, or `{"type": "function", "name": ...}`."""

    named = '{"type": "function", "name": "..."}'
    tools: list[ResponseTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | ResponseChoice = "auto"
    parallel_tool_calls: bool = True

    @property
    def toolbox(self) -> Toolbox | None:
        """What may be called; None when nothing may."""
        named = self.tool_choice.name if isinstance(self.tool_choice, ResponseChoice) else None
        choice = self.tool_choice if isinstance(self.tool_choice, str) else "auto"
        return toolbox([one.tool() for one in self.tools], choice, named, self.parallel_tool_calls, "parameters")


def toolbox(
    tools: Sequence[Tool], choice: Literal["none", "auto", "required"], named: str | None, parallel: bool, schema_field: str
) -> Toolbox | None:
    """What may be called, None when nothing may. A named function is called once, as OpenAI does it."""
    forced = named is not None or choice == "required"
    if not tools and forced:
        raise InputError("tool_choice asks for a call, and there are no tools", "send tools, or leave tool_choice out", field="tool_choice")
    if not tools or choice == "none":
        return None
    return Toolbox(tuple(tools), "required" if forced else "auto", named, parallel and named is None, schema_field)


class CalledFunction(BaseModel):
    model_config = _STRICT
    name: str = Field(min_length=1, max_length=256)
    arguments: str


class MadeCall(BaseModel):
    """A call in the assistant's turn, as the server had answered it."""

    model_config = _STRICT
    id: str = Field(min_length=1, max_length=128)
    type: Literal["function"] = "function"
    function: CalledFunction
