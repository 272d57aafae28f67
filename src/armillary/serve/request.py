"""A request: what was asked, and one counter (`computed`) that chases another (`known`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from armillary.core.values import value

if TYPE_CHECKING:
    from torch import Tensor

    from armillary.serve.constraint import Constraint
    from armillary.serve.text import TextStream

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose the next token. Names and meanings follow the OpenAI API and vLLM.

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` switch those filters off.
    `logprobs` is how many alternatives to report beside the chosen token (None: no logprobs at all).
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@value
class TokenLogprob:
    """A token, its log-probability (None when not asked for), and `top` alternatives as (token, logprob), best first."""

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@value
class Event:
    """One step of a request's output, handed to `Request.on_event` on the engine's thread.

    `token` is None when only the end is announced (cancel, error). `text` is the newly certain text:
    never half a UTF-8 character, never part of a stop string.
    """

    request_id: str
    token: int | None
    text: str
    logprob: TokenLogprob | None
    finish_reason: FinishReason | None
    at: int
    error: Exception | None = None


@dataclass(slots=True, eq=False)
class Request:
    """One sequence to continue. The engine owns the mutable fields; policies only read.

    `arrival` is in ns of the engine's clock; the engine stamps it at submit if it is None. So is `deadline`, by when the first token is due.
    """

    id: str
    prompt: tuple[int, ...]
    sampling: SamplingParams
    arrival: int | None = None
    priority: int = 0  # its class: a lower one is served earlier
    deadline: int | None = None
    cache_salt: str = ""  # computed keys and values are shared among requests of the same salt only
    session: str = ""  # the conversation that it belongs to, where that is known: routers may keep it on one replica
    adapter: str = ""  # the low-rank weights that it runs with, "" for none
    delivered: int = 0  # tokens whose keys and values come with the request, from the worker that computed them
    constraint: Constraint | None = None  # what may come next
    parent: Request | None = None  # a sequence that begins with this one's prompt (but its last token), whose cache it begins with
    retained: bool = False  # its blocks stay when it has ended, for forks, until `Engine.let_go` or until the memory is needed
    pooling: bool = False  # it wants the hidden state of its prompt's last token, and no more tokens (`max_tokens` 0)
    text: TextStream | None = None
    on_event: Callable[[Event], None] | None = None
    # State, written by the engine alone.
    number: int = 0  # in the order of submission
    output: list[int] = field(default_factory=list)
    drafts: tuple[int, ...] = ()  # proposed for what follows the known tokens, to be verified in the next iteration
    draft_laws: tuple[Tensor, ...] = ()  # what each draft was drawn from [vocabulary]; empty where they were named outright
    computed: int = 0  # tokens whose keys and values are in the cache
    blocks: list[int] = field(default_factory=list)  # block table
    dropped: int = 0  # blocks that its KV policy has taken out of the table's middle
    reused: int = 0  # tokens that the prefix cache had when the sequence was first admitted
    kept: int = 0  # blocks that the prefix cache knows
    block_names: list[bytes] = field(default_factory=list)  # of full blocks, as far as the prefix cache has asked
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    pooled: Tensor | None = None  # [hidden] after the final norm, when `pooling`
    finish_reason: FinishReason | None = None
    preemptions: int = 0
    drafted: int = 0  # proposed tokens that were verified ...
    accepted: int = 0  # ... and those of them that were right
    first_scheduled: int | None = None  # ns
    first_token: int | None = None  # ns
    last_token: int | None = None  # ns
    finished: int | None = None  # ns

    @property
    def known(self) -> int:
        """Tokens known so far: prompt and output. The request wants `known - computed` more computed."""
        return len(self.prompt) + len(self.output)

    @property
    def max_length(self) -> int:
        """The most tokens this sequence can ever have."""
        return len(self.prompt) + self.sampling.max_tokens

    def tokens(self, start: int, end: int) -> Sequence[int]:
        """The known tokens at positions `start` to `end` - 1 of prompt + output."""
        prompt = len(self.prompt)
        if end <= prompt:
            return self.prompt[start:end]
        if start >= prompt:
            return self.output[start - prompt : end - prompt]
        return [*self.prompt[start:], *self.output[: end - prompt]]

    def token(self, position: int) -> int:
        """The token at `position` of prompt + output."""
        prompt = len(self.prompt)
        return self.prompt[position] if position < prompt else self.output[position - prompt]
