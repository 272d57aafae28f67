"""What an answer must look like: OpenAI's `response_format`, and vLLM's `structured_outputs` with its older `guided_*` names."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from armillary.core.errors import InputError
from armillary.serve.grammar import grammar as grammars
from armillary.serve.grammar.grammar import Grammar
from armillary.serve.http.body import Body

_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True)
Text = Annotated[str, Field(min_length=1, max_length=grammars.MAX_CHARACTERS)]
Choices = Annotated[list[Text], Field(min_length=1, max_length=grammars.MAX_CHOICES)]


class NamedSchema(BaseModel):
    """`strict` or not, the answer is valid under `schema`."""

    model_config = ConfigDict(**_STRICT, protected_namespaces=())
    name: str = Field("", max_length=64)
    description: str | None = None
    json_schema: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    model_config = _STRICT
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(BaseModel):
    """One of them. `disable_any_whitespace`: JSON only as `json.dumps` writes it, so that more of it is known beforehand."""

    model_config = ConfigDict(**_STRICT, protected_namespaces=())
    json_of: dict[str, Any] | Text | None = Field(None, alias="json")
    json_object: bool | None = None
    regex: Text | None = None
    choice: Choices | None = None
    grammar: Text | None = None
    disable_any_whitespace: bool = False

    @field_validator("json_of", mode="before")
    @classmethod
    def _schema(cls, value: Any) -> Any:
        return _is_schema(value)


class StructuredBody(Body):
    """At most one of these."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | Text | None = None
    guided_regex: Text | None = None
    guided_choice: Choices | None = None
    guided_grammar: Text | None = None

    @field_validator("guided_json", mode="before")
    @classmethod
    def _schema(cls, value: Any) -> Any:
        return _is_schema(value)

    @property
    def structured(self) -> bool:
        """Whether any of these was sent."""
        return bool(self.model_fields_set & StructuredBody.model_fields.keys())

    def grammar(self) -> Grammar | None:
        """What the answer must follow, checked but not yet compiled. Raises InputError with the place of what is wrong."""
        asked = [
            *_of_format(self.response_format),
            *_of_outputs(self.structured_outputs),
            *_given("guided_json", self.guided_json, grammars.json_schema),
            *_given("guided_regex", self.guided_regex, grammars.regex),
            *_given("guided_choice", self.guided_choice, grammars.choice),
            *_given("guided_grammar", self.guided_grammar, grammars.ebnf),
        ]
        if len(asked) > 1:
            names = [grammar.field for grammar in asked]
            raise InputError(f"{names[0]} and {names[1]} both say what the answer must look like", "send one of them", field=names[1])
        return asked[0] if asked else None


def _of_format(given: ResponseFormat | None) -> list[Grammar]:
    if given is None or given.type == "text":
        return []
    if given.type == "json_object":
        return [grammars.json_object(field="response_format")]
    if given.json_schema is None or given.json_schema.json_schema is None:
        raise InputError(
            "the type json_schema needs a schema", 'send "json_schema": {"schema": {...}}', field="response_format.json_schema"
        )
    return [grammars.json_schema(given.json_schema.json_schema, field="response_format.json_schema.schema")]


def _of_outputs(given: StructuredOutputs | None) -> list[Grammar]:
    if given is None:
        return []
    spaces = None if given.disable_any_whitespace else grammars.MAX_WHITESPACE
    here = "structured_outputs"
    found = [
        *_given(f"{here}.json", given.json_of, lambda value, field: grammars.json_schema(value, field=field, spaces=spaces)),
        *_given(f"{here}.json_object", given.json_object or None, lambda value, field: grammars.json_object(field=field, spaces=spaces)),
        *_given(f"{here}.regex", given.regex, grammars.regex),
        *_given(f"{here}.choice", given.choice, grammars.choice),
        *_given(f"{here}.grammar", given.grammar, grammars.ebnf),
    ]
    if not found:
        raise InputError("it asks for nothing", "give json, json_object, regex, choice or grammar", field=here)
    return found


def _is_schema(value: Any) -> Any:
    if value is not None and not isinstance(value, dict | str):
        raise ValueError("send a JSON schema: an object, or its text")
    return value


def _given(field: str, value: Any, make: Any) -> list[Grammar]:
    return [] if value is None else [make(value, field=field)]
