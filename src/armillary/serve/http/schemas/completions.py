"""`POST /v1/completions`: prompts as text or tokens, continued."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

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
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            raise ValueError("send a string, a list of strings, a list of token ids, or a list of such lists; none of them empty")
        if _is_tokens(value):
            return [value]
        if len(value) > MAX_CHOICES:
            raise ValueError(f"{len(value)} prompts: send at most {MAX_CHOICES} in one request")
        for index, prompt in enumerate(value):
            if not isinstance(prompt, str) and not _is_tokens(prompt):
                raise ValueError(f"prompt {index} is neither a string nor a list of token ids")
            if type(prompt) is not type(value[0]):
                raise ValueError("strings and token ids cannot be mixed in one request")
        return value

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


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)
