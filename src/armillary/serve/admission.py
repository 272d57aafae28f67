"""Whether a request can be served at all: what no waiting would cure is refused at the door."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from operator import attrgetter
from typing import Final

from armillary.core.errors import InputError
from armillary.serve.config import EngineConfig
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Limits


def admissible(request: Request, config: EngineConfig, limits: Limits) -> None:
    """Raises InputError, naming both numbers, when `request` could never run to its end, however long it waited."""
    prompt, most = len(request.prompt), request.sampling.max_tokens
    if not request.id:
        raise InputError("a request has no id", "give it a non-empty id", field="id")
    if prompt == 0:
        raise InputError("the prompt is empty", "give at least one token", field="prompt")
    if most < 0:
        raise InputError(f"max_tokens is {most}", "use 0 (score the prompt) or more", field="max_tokens")
    _in_range(request.sampling)
    _in_order(request, config.order)
    if request.constraint is not None and request.sampling.ignore_eos:
        raise InputError("an answer that follows a grammar ends where the grammar does", "leave ignore_eos out", field="ignore_eos")
    if request.parent is not None and request.parent.adapter != request.adapter:
        raise InputError(
            f"request '{request.id}' and its parent have different adapters", "share a prompt within one adapter", field="adapter"
        )
    if request.computed or request.blocks or request.finish_reason is not None or len(request.output) > max(0, most - 1):
        raise InputError(f"request '{request.id}' has already been served", "make a new Request", field="id")
    if request.parent is not None and request.parent.prompt[: prompt - 1] != request.prompt[:-1]:
        raise InputError(
            f"request '{request.id}' does not begin with the prompt of its parent '{request.parent.id}'",
            "a fork's prompt is its parent's, or that and one token more",
            field="parent",
        )
    context = config.context
    if context is not None and request.max_length > context:
        larger = "a larger --context" if config.kv.unbounded else "a larger --context, up to what the model was made for"
        raise InputError(
            f"prompt of {prompt:,} tokens and max_tokens {most:,} make {request.max_length:,} tokens; the context is {context:,}",
            f"shorten the prompt, lower max_tokens, or serve with {larger}",
            field="prompt" if prompt >= context else "max_tokens",
        )
    blocks = limits.blocks_for(request.max_length)
    if blocks > limits.total_blocks:
        raise InputError(
            f"prompt of {prompt:,} tokens and max_tokens {most:,} need {blocks:,} KV blocks of {limits.block_size} tokens; "
            f"the pool has {limits.total_blocks:,}",
            "shorten the prompt, lower max_tokens, or serve with more --kv-memory",
            field="prompt" if limits.blocks_for(prompt) > limits.total_blocks else "max_tokens",
        )


def _in_order(request: Request, order: str) -> None:
    """Raises InputError for a wish that the queue's order would not look at."""
    if request.priority and order != "priority":
        raise InputError(
            f"priority {request.priority} is asked for, but the queue's order is {order}",
            "leave priority out, or serve with --order priority",
            field="priority",
        )
    if request.deadline is not None and order != "deadline":
        raise InputError(
            f"a first token is wanted by a time, but the queue's order is {order}",
            "leave ttft_ms out, or serve with --order deadline",
            field="ttft_ms",
        )


def _in_range(params: SamplingParams) -> None:
    """Raises InputError for a sampling number from which nothing can be drawn; NaN is in no range."""
    for (name, low, high), value in zip(_BOUNDS, _bounded(params), strict=True):
        if not low <= value <= high:
            raise InputError(f"{name} is {value}", f"give a number from {low:g} to {high:g}", field=name)


_BOUNDS: Final = (
    ("temperature", 0.0, sys.float_info.max),
    ("top_k", 0, 1 << 31),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 1e-3, 1e3),
    ("presence_penalty", -1e3, 1e3),
    ("frequency_penalty", -1e3, 1e3),
)
_bounded: Final = attrgetter(*(name for name, _, _ in _BOUNDS))


def known_tokens(ids: Iterable[int], vocabulary: int, field: str) -> None:
    """Raises InputError naming the first of `ids` that the model has no embedding for."""
    for token in ids:
        if not 0 <= token < vocabulary:
            raise InputError(
                f"{field}: token {token} is outside the vocabulary of {vocabulary} tokens", "send ids that /tokenize gives", field=field
            )
