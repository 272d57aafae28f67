"""`POST /v1/completions`: prompts as text or tokens, continued."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from armillary.serve.http.schemas.prompts import prompts
from armillary.serve.http.schemas.sampling import MAX_CHOICES, MAX_LOGPROBS, MAX_TOKENS, SamplingBody
from armillary.serve.http.schemas.structure import StructuredBody
from armillary.serve.http.schemas.written import TEXT, TOKENS, either, some

DEFAULT_MAX_TOKENS = 16  # OpenAI's default for this endpoint
Prompt = str | list[int]


class CompletionBody(SamplingBody, StructuredBody):
    """`prompt` is a string, a list of strings, a list of token ids, or a list of such lists.

    `echo` puts the prompt before the answer; with `logprobs` its tokens are scored too. `max_tokens` 0 is allowed
    with `echo`: score a text and generate nothing.
    """

    prompt: Annotated[list[Any], either(TEXT, TOKENS, some(TEXT, MAX_CHOICES), some(TOKENS, MAX_CHOICES))]  # of Prompt
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    max_tokens: int = Field(DEFAULT_MAX_TOKENS, ge=0, le=MAX_TOKENS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _prompts(cls, value: Any) -> Any:
        given = prompts(value, MAX_CHOICES, "prompt")
        if any(type(one) is not type(given[0]) for one in given):
            raise ValueError("strings and token ids cannot be mixed in one request")
        return given

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 without echo asks for nothing: ask for at least 1")
        if len(self.prompt) * self.n > MAX_CHOICES:
            raise ValueError(
                f"{len(self.prompt)} prompts with n = {self.n} make {len(self.prompt) * self.n} choices: ask for at most {MAX_CHOICES}"
            )
        return self
