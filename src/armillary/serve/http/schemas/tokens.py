"""`POST /tokenize` and `POST /detokenize`, as vLLM has them."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from armillary.serve.http.body import Body
from armillary.serve.http.schemas.chat import MAX_MESSAGES, ChatMessage


class TokenizeBody(Body):
    """`prompt` or `messages`. A prompt gets the model's BOS unless `add_special_tokens` is false; messages go through the chat template."""

    model: str | None = Field(None, max_length=512)
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeBody(Body):
    model: str | None = Field(None, max_length=512)
    tokens: list[int]
