"""Tools as Anthropic's API has them."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from armillary.serve.http.body import Body
from armillary.serve.http.schemas.tools import Name, toolbox
from armillary.serve.tools.definitions import MAX_TOOLS, Tool, Toolbox

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)


class MessageTool(BaseModel):
    """A tool that the client carries out. `HARMLESS` are the values of Anthropic's other fields that ask for nothing."""

    HARMLESS: ClassVar[dict[str, tuple[Any, ...]]] = {"defer_loading": (False,), "allowed_callers": (["direct"],), "input_examples": ([],)}
    IGNORED: ClassVar[tuple[str, ...]] = ("cache_control", "eager_input_streaming")

    model_config = _STRICT
    type: Literal["custom"] = "custom"
    name: Name
    description: str | None = Field(None, max_length=65_536)
    input_schema: dict[str, Any]
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _of_the_client(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kind = data.get("type")
        if kind not in (None, "custom"):
            raise ValueError(f"a tool of type {str(kind)[:40]!r} is not carried out by this server: send tools with an input_schema")
        for name, harmless in cls.HARMLESS.items():
            if data.get(name) is not None and data[name] not in harmless:
                raise ValueError(f"{name} is not supported by this server: leave it out")
        dropped = (*cls.HARMLESS, *cls.IGNORED, *([] if kind else ["type"]))
        return {name: value for name, value in data.items() if name not in dropped}


class MessageChoice(BaseModel):
    model_config = _STRICT
    type: Literal["auto", "any", "tool", "none"]
    name: Name | None = None
    disable_parallel_tool_use: bool = False

    @model_validator(mode="after")
    def _named(self) -> Self:
        if (self.name is None) == (self.type == "tool"):
            raise ValueError('the type tool needs the name of one: {"type": "tool", "name": "..."}; other types have none')
        return self


class MessageToolFields(Body):
    tools: list[MessageTool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: MessageChoice = MessageChoice(type="auto")

    @property
    def toolbox(self) -> Toolbox | None:
        """What may be called; None when nothing may."""
        tools = [Tool(one.name, one.description or "", one.input_schema, bool(one.strict)) for one in self.tools]
        choice: Literal["none", "auto", "required"] = (
            "none" if self.tool_choice.type == "none" else "auto" if self.tool_choice.type == "auto" else "required"
        )
        return toolbox(tools, choice, self.tool_choice.name, not self.tool_choice.disable_parallel_tool_use, "input_schema")
