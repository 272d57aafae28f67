"""`POST /v1/embeddings` and `/rerank`: inputs to vectors, documents to an order."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator

from armillary.serve.http.body import Body
from armillary.serve.http.schemas.prompts import prompts

MAX_INPUTS = 2048


class EmbeddingsBody(Body):
    """`input` is a string, strings, a list of token ids, or lists of them. None is ever cut."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {"truncate_prompt_tokens": (), "truncation": (), "task": (), "normalized": (True,)}
    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})

    model: str | None = Field(None, max_length=512)
    input: list[Any]  # of str | list[int]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(None, ge=1)

    @field_validator("input", mode="before")
    @classmethod
    def _inputs(cls, value: Any) -> Any:
        return prompts(value, MAX_INPUTS, "input")


class RerankBody(Body):
    """`documents` are strings or objects with a `text`; the best `top_n` (default: all) come back, best first."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "rank_fields": (),
        "max_chunks_per_doc": (),
        "max_tokens_per_doc": (),
        "overlap_tokens": (),
        "priority": (0,),
        "truncate_prompt_tokens": (),
        "truncation": (),
    }
    IGNORED: ClassVar[frozenset[str]] = frozenset({"user"})

    model: str | None = Field(None, max_length=512)
    query: str = Field(min_length=1)
    documents: list[str] = Field(min_length=1, max_length=MAX_INPUTS)
    top_n: int | None = Field(None, ge=1)
    return_documents: bool = False

    @field_validator("documents", mode="before")
    @classmethod
    def _texts(cls, value: Any) -> Any:
        if not isinstance(value, list):
            raise ValueError("send a list of strings")
        texts = []
        for index, one in enumerate(value[: MAX_INPUTS + 1]):
            text = one.get("text") if isinstance(one, dict) and one.keys() == {"text"} else one
            if not isinstance(text, str) or not text:
                raise ValueError(f'document {index} must be a string or {{"text": "..."}}, not empty')
            texts.append(text)
        return texts
