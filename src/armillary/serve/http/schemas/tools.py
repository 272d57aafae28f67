"""Functions that a model may call, as the chat API has them, and calls within a conversation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

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


class ToolFields(Body):
    """`tool_choice`: none, auto, required, or `{"type": "function", "function": {"name": ...}}`."""

    tools: list[ToolBody] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedChoice | None = None
    parallel_tool_calls: bool = True

    @field_validator("tool_choice", mode="before")
    @classmethod
    def _one_of(cls, value: Any) -> Any:
        if value in ("none", "auto", "required") or (isinstance(value, dict) and value.get("type") == "function"):
            return value
        raise ValueError('send "none", "auto", "required", or {"type": "function", "function": {"name": "..."}}')

    @property
    def toolbox(self) -> Toolbox | None:
        """What may be called; None when nothing may."""
        if not self.tools and self.tool_choice not in (None, "none", "auto"):
            raise InputError(
                "tool_choice asks for a call, and there are no tools", "send tools, or leave tool_choice out", field="tool_choice"
            )
        if not self.tools or self.tool_choice == "none":
            return None
        tools = tuple(
            Tool(
                tool.function.name,
                tool.function.description or "",
                tool.function.parameters or {"type": "object", "properties": {}},
                bool(tool.function.strict),
            )
            for tool in self.tools
        )
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedChoice) else None
        forced = named is not None or self.tool_choice == "required"
        # A named function is called once, as OpenAI does it.
        return Toolbox(tools, "required" if forced else "auto", named, self.parallel_tool_calls and named is None)


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
