"""The sampling fields that the generating endpoints share: OpenAI's, and vLLM's extras at the top level."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from armillary.serve.http.schemas.turn import TurnBody
from armillary.serve.http.schemas.written import BIASES, either, some
from armillary.serve.request import SamplingParams

MAX_CHOICES = 128
MAX_STOP_STRINGS = 4
MAX_STOP_LENGTH = 512  # characters
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_TOKENS = 2**31 - 1
STOP = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_LENGTH}


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)
    include_usage: bool = False


class DrawingBody(TurnBody):
    """How tokens are drawn. `temperature` 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch those filters off."""

    IGNORED: ClassVar[frozenset[str]] = frozenset({"user", "safety_identifier", "prompt_cache_key", "metadata"})

    model: str | None = Field(None, max_length=512)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS)
    min_p: float = Field(0.0, ge=0, le=1)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=10)
    seed: int | None = Field(None, ge=0, lt=2**63)
    cache_salt: str | None = Field(None, min_length=1, max_length=256)  # vLLM's: only requests with the same share computed prompts
    stop: Annotated[list[str], either(STOP, some(STOP, MAX_STOP_STRINGS, 0))] = Field(default_factory=list)
    stop_token_ids: list[Annotated[int, Field(ge=0)]] = Field(default_factory=list, max_length=MAX_STOP_TOKENS)
    ignore_eos: bool = False
    logit_bias: Annotated[dict[str, float], BIASES] = Field(default_factory=dict)

    @field_validator("stop", mode="before")
    @classmethod
    def _stop(cls, value: Any) -> Any:
        stops = [value] if isinstance(value, str) else value
        if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops[: MAX_STOP_STRINGS + 1]):
            raise ValueError("send a string, or a list of strings")
        if len(stops) > MAX_STOP_STRINGS:
            raise ValueError(f"at most {MAX_STOP_STRINGS} stop strings")
        for stop in stops:
            if not 1 <= len(stop) <= MAX_STOP_LENGTH:
                raise ValueError(f"a stop string must have 1 to {MAX_STOP_LENGTH} characters")
        return stops

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _logit_bias(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError("send an object of token ids to biases")
        if len(value) > MAX_LOGIT_BIAS:
            raise ValueError(f"at most {MAX_LOGIT_BIAS} tokens can be biased")
        for token, bias in value.items():
            if not (token.isascii() and token.isdigit() and len(token) <= 10):
                raise ValueError(f'{token[:40]!r} is not a token id: keys are token ids as strings, like "42"')
            if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} must be a number from -100 to 100")
        return {token: float(bias) for token, bias in value.items()}

    def sampling(self, max_tokens: int, *, logprobs: int | None = None, prompt_logprobs: int | None = None) -> SamplingParams:
        """The engine's words for these fields. Token ids are checked against the vocabulary elsewhere."""
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
            stop_token_ids=tuple(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logit_bias=tuple(sorted({int(token): bias for token, bias in self.logit_bias.items()}.items())),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


class SamplingBody(DrawingBody):
    """What both completions add: several choices, streams with usage, a bound on the answer."""

    UNSUPPORTED: ClassVar[dict[str, tuple[Any, ...]]] = {
        "store": (False,),
        "service_tier": ("auto", "default"),
        "best_of": (),
        "suffix": (),
    }

    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKENS)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    stream: bool = False
    stream_options: StreamOptions | None = None
