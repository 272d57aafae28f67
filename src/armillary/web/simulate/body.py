"""What may be asked of a simulation over HTTP: the flags of `armillary simulate`, but those that name files."""

from __future__ import annotations

import re
import shlex
from typing import Any, ClassVar, Final, Literal

from pydantic import Field, field_validator, model_validator

from armillary.serve.http.body import Body
from armillary.serve.workload.lengths import alike

MOST_REQUESTS: Final = 20_000
MOST_ENGINES: Final = 256
MOST_TOKENS: Final = 100_000_000
"""Of all prompts, and of all answers, where all requests are alike."""
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,199}")
_CLUSTER: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+/-]{0,199}")
_FILES: Final = "files are for the command line: armillary simulate serve"

Degree = Field(None, ge=1, le=1024)
Engines = Field(None, ge=1, le=MOST_ENGINES)
Word = Field(None, min_length=1, max_length=200)


class Simulation(Body):
    """A configuration and what comes. A field that is left out has the default of its flag."""

    OWN: ClassVar[frozenset[str]] = frozenset({"model"})
    """Fields that are no flags."""

    model: str
    cluster: str | None = None
    tensor_parallel: int | None = Degree
    pipeline_parallel: int | None = Degree
    pipeline_batches: int | None = Degree
    replicas: int | None = Engines
    router: str | None = Word
    tail: str | None = Word
    hedge_budget: float | None = None
    prefill_workers: int | None = Engines
    decode_workers: int | None = Engines
    decode_tensor_parallel: int | None = Degree
    decode_pipeline_parallel: int | None = Degree
    kv_link: str | None = Word
    host_us: float | None = Field(None, ge=0, le=1e6)
    profile: Literal["a100", "h100"] | None = None

    lengths: str | None = Word
    variation: float | None = None
    acceptance: str | None = Word

    policy: str | None = Word
    order: str | None = Word
    max_wait: str | None = Word
    victim: str | None = Word
    tbt_target: str | None = Word
    block_size: int | None = None
    kv_blocks: int | None = None
    kv_memory: str | None = Word
    max_batch_tokens: int | None = None
    max_running: int | None = None
    max_queue: int | None = None
    context: int | None = None
    quantize: str | None = Word
    kv_dtype: str | None = Word
    kv_policy: str | None = Word
    kv_sinks: int | None = None
    kv_window: int | None = None
    kv_budget: int | None = None
    kv_dense_layers: int | None = None
    prefix_cache: str | None = Word
    async_scheduling: str | None = Word
    speculate: str | None = Word
    draft_model: str | None = None
    draft_tokens: int | None = None
    draft_layers: float | None = None
    seed: int | None = None

    @field_validator("model", "draft_model")
    @classmethod
    def _is_a_name(cls, name: str | None) -> str | None:
        if name is not None and (not _NAME.fullmatch(name) or name.endswith((".gguf", ".json"))):
            raise ValueError(f"give a model's name, such as llama-2-7b ({_FILES} PATH)")
        return name

    @field_validator("cluster")
    @classmethod
    def _is_spelled(cls, text: str | None) -> str | None:
        if text is not None and (not _CLUSTER.fullmatch(text) or text.endswith((".toml", ".json"))):
            raise ValueError(f"give a cluster's spelling, such as a100 or dgx-h100:2 ({_FILES} MODEL --cluster PATH)")
        return text

    def arguments(self, model: str | None = None) -> list[str]:
        """The command line after the verb; `model` is what this machine calls it."""
        given = {name: value for name, value in self.model_dump(exclude_none=True).items() if name not in self.OWN}
        return [model or self.model, *(f"--{name.replace('_', '-')}={value}" for name, value in given.items())]

    def command(self, verb: str) -> str:
        """What does the same in a terminal."""
        model, *flags = self.arguments()
        return shlex.join(["armillary", "simulate", verb, model, *(part for flag in flags for part in flag.split("=", 1))])


class Timed(Simulation):
    """A workload of so many requests, or conversations, at a rate."""

    requests: int | None = Field(None, ge=1, le=MOST_REQUESTS)
    rate: float | None = None
    sessions: int | None = Field(None, ge=1, le=MOST_REQUESTS)
    turns: str | None = Word
    think: str | None = Word
    system_prompt: str | None = Word
    adapters: int | None = Field(None, ge=1, le=MOST_REQUESTS)
    adapter_rank: int | None = None
    adapter_skew: float | None = None

    @model_validator(mode="after")
    def _is_bounded(self) -> Timed:
        tokens = (self.requests or 1000) * max(alike(self.lengths or "") or (0, 0))
        if tokens > MOST_TOKENS:
            raise ValueError(f"{tokens:,} tokens are over this server's {MOST_TOKENS:,}: ask for fewer requests, or shorter ones")
        return self


class ServeBody(Timed):
    """`POST /simulate/serve`."""

    slo: str | None = Word


class TraceBody(Timed):
    """`POST /simulate/trace`: every token of every request is a span, so there are fewer of them."""

    requests: int | None = Field(None, ge=1, le=1000)


class WatchBody(Timed):
    """`POST /simulate/watch`."""

    replica: int | None = Field(None, ge=0, lt=MOST_ENGINES)


class CapacityBody(Simulation):
    """`POST /simulate/capacity`."""

    slo: str = Field(min_length=1, max_length=200)
    tolerance: float | None = Field(None, ge=0.02, lt=1)


def facts() -> dict[str, Any]:
    """The bounds, for who fills in a form."""
    return {"requests": MOST_REQUESTS, "engines": MOST_ENGINES, "tokens": MOST_TOKENS}
