"""`POST /v1/chat/completions`: what may be said and how it is answered."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armillary.serve.http.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, SamplingBody
from armillary.serve.http.schemas.written import TEXT_PARTS

MAX_MESSAGES = 4096

# What OpenAI's own client sends back inside an assistant's message, and means nothing when null or empty.
EMPTY_IN_MESSAGE = ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")


class ChatMessage(BaseModel):
    """One turn. `content` is a string or a list of `{"type": "text", "text": ...}` parts, which are joined by newlines."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, TEXT_PARTS]
    name: str | None = Field(None, max_length=256)

    @model_validator(mode="before")
    @classmethod
    def _drop_empty(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise ValueError('a message is an object like {"role": "user", "content": "..."}')
        if data.get("role") in ("tool", "function"):
            raise ValueError(f"role {data['role']!r} is not supported by this server: tool calling is not available")
        for name in EMPTY_IN_MESSAGE:
            if data.get(name):
                raise ValueError(f"{name} in a message is not supported by this server")
        return {name: value for name, value in data.items() if name not in EMPTY_IN_MESSAGE}

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

    def for_template(self) -> dict[str, str]:
        """As chat templates expect it. OpenAI's `developer` is its newer name for `system`, the one that templates know."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


class ChatBody(SamplingBody):
    """The answer may run to the end of the context unless `max_completion_tokens` (or the older `max_tokens`) bounds it."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        **{name: bounds for name, bounds in SamplingBody.UNSUPPORTED.items() if name != "suffix"},
        "tools": (),
        "tool_choice": ("none",),
        "parallel_tool_calls": (),
        "functions": (),
        "function_call": (),
        "response_format": ({"type": "text"},),
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
