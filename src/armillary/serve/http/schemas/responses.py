"""`POST /v1/responses`: what may be said, with or without the conversation that a stored response remembers."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from armillary.core.errors import InputError
from armillary.serve.grammar.grammar import Grammar, json_object, json_schema
from armillary.serve.http.schemas.items import item
from armillary.serve.http.schemas.sampling import MAX_LOGPROBS, MAX_TOKENS, DrawingBody
from armillary.serve.http.schemas.tools import ResponseToolFields
from armillary.serve.http.schemas.written import TEXT, either, some, typed

MAX_ITEMS = 4096
LOGPROBS = "message.output_text.logprobs"
MAX_METADATA = 16

Key = Annotated[str, Field(max_length=64)]
Note = Annotated[str, Field(max_length=512)]


_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, protected_namespaces=())


class TextFormat(BaseModel):
    """What the answer must look like; `strict` or not, it is valid under `schema`."""

    model_config = _STRICT
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = Field(None, max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def grammar(self) -> Grammar | None:
        """Checked but not yet compiled. Raises InputError with the place of what is wrong."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return json_object(field="text.format")
        if self.json_schema is None:
            raise InputError("the type json_schema needs a schema", 'send "schema": {...}', field="text.format.schema")
        return json_schema(self.json_schema, field="text.format.schema")


class TextConfig(BaseModel):
    model_config = _STRICT
    format: TextFormat = Field(default_factory=lambda: TextFormat.model_validate({}))


class ResponsesBody(DrawingBody, ResponseToolFields):
    """`input` is a string (one user message) or items; the answer may run to the end of the context unless `max_output_tokens` bounds it."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "max_tool_calls": (),
        "reasoning": ({},),
        "truncation": ("disabled",),
        "stream_options": ({"include_obfuscation": False},),
        "service_tier": ("auto", "default"),
        "conversation": (),
        "prompt": (),
        "moderation": (),
        "context_management": ([],),
        "image": (),
        "access_programs": (),
        "n": (1,),
        "max_tokens": (),
        "max_completion_tokens": (),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset(
        {"user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"}
    )

    input: Annotated[
        list[dict[str, Any]], either(TEXT, some(typed("message", "function_call", "function_call_output", required=False), MAX_ITEMS))
    ] = Field(min_length=1, max_length=MAX_ITEMS)
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    store: bool = True
    background: bool = False
    stream: bool = False
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    include: list[Literal["message.output_text.logprobs"]] = Field(default_factory=list, max_length=1)
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: TextConfig = Field(default_factory=TextConfig)
    metadata: dict[Key, Note] = Field(default_factory=dict, max_length=MAX_METADATA)

    @field_validator("input", mode="before")
    @classmethod
    def _items(cls, value: Any) -> Any:
        if isinstance(value, str):
            return [{"type": "message", "role": "user", "content": value}]
        if not isinstance(value, list):
            raise ValueError("send a string or a list of items")
        if len(value) > MAX_ITEMS:
            raise ValueError(f"{len(value)} items: send at most {MAX_ITEMS}")
        return [item(index, given) for index, given in enumerate(value)]

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.top_logprobs and not self.include:
            raise ValueError(f'top_logprobs needs include: ["{LOGPROBS}"]')
        if self.background and self.stream:
            raise ValueError("background and stream exclude each other here: ask for the response's state with GET instead")
        if self.background and not self.store:
            raise ValueError("background needs store: true, or nobody could ask for the response")
        return self

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None
