"""`POST /v1/chat/completions`: what may be said and how it is answered."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armillary.serve.http.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, SamplingBody
from armillary.serve.http.schemas.structure import StructuredBody
from armillary.serve.http.schemas.tools import MadeCall, ToolFields
from armillary.serve.http.schemas.written import TEXT_PARTS
from armillary.serve.tools.definitions import MAX_TOOLS

MAX_MESSAGES = 4096

# What OpenAI's own client sends back inside an assistant's message, and means nothing when null or empty.
EMPTY_IN_MESSAGE = ("refusal", "annotations", "audio", "function_call", "reasoning_content")


class ChatMessage(BaseModel):
    """One turn. `content` is a string or a list of `{"type": "text", "text": ...}` parts, which are joined by newlines.

    An assistant's turn with `tool_calls` may do without; a tool's turn answers the call named by `tool_call_id`.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, TEXT_PARTS] = ""
    name: str | None = Field(None, max_length=256)
    tool_calls: list[MadeCall] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(None, min_length=1, max_length=128)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError('a message is an object like {"role": "user", "content": "..."}')
        if data.get("role") == "function":
            raise ValueError("role 'function' is not supported by this server: send tool messages")
        for name in EMPTY_IN_MESSAGE:
            if data.get(name):
                raise ValueError(f"{name} in a message is not supported by this server")
        kept = {name: value for name, value in data.items() if name not in EMPTY_IN_MESSAGE}
        for name in ("tool_calls", "content"):  # as OpenAI's own client sends them back
            if name in kept and kept[name] is None and (name == "tool_calls" or kept.get("tool_calls")):
                del kept[name]
        return kept

    @model_validator(mode="after")
    def _turn(self) -> Self:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"only an assistant's message has tool_calls, not one of role {self.role!r}")
        if (self.tool_call_id is not None) != (self.role == "tool"):
            raise ValueError("a message of role 'tool' needs the tool_call_id of the call that it answers; others have none")
        if not self.tool_calls and "content" not in self.model_fields_set:
            raise ValueError("the message has no content: send a string")
        return self

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: Any) -> Any:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise ValueError("send a string, or a list of text parts")
        texts = []
        for index, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text":
                raise ValueError(f"part {index} is of type {str(kind)[:40]!r}: this model reads only text parts")
            if not isinstance(part.get("text"), str) or part.keys() - {"type", "text"}:
                raise ValueError(f'part {index} must be {{"type": "text", "text": "..."}}')
            texts.append(part["text"])
        return "\n".join(texts)  # as the chat templates of Hugging Face join them

    def for_template(self) -> dict[str, Any]:
        """As `Service.chat_tokens` takes it. OpenAI's `developer` is its newer name for `system`, the one that templates know."""
        message: dict[str, Any] = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name is not None:
            message["name"] = self.name
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            message["tool_call_id"] = self.tool_call_id
        return message


class ChatBody(SamplingBody, StructuredBody, ToolFields):
    """The answer may run to the end of the context unless `max_completion_tokens` (or the older `max_tokens`) bounds it."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **{name: bounds for name, bounds in SamplingBody.UNSUPPORTED.items() if name != "suffix"},
        "functions": (),
        "function_call": (),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "reasoning_effort": (),
        "verbosity": (),
        "web_search_options": (),
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("messages")
    @classmethod
    def _calls_come_first(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        calls: set[str] = set()
        for index, message in enumerate(messages):
            if message.tool_call_id is not None and message.tool_call_id not in calls:
                raise ValueError(f"message {index} answers the call {message.tool_call_id!r}, which no message before it has made")
            calls.update(call.id for call in message.tool_calls)
        return messages

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ: send only max_completion_tokens")
        return self

    @property
    def wanted_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
