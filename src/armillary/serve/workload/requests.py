"""From arrivals and lengths to requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from armillary.core.errors import InputError
from armillary.serve.request import Request, SamplingParams

if TYPE_CHECKING:
    from armillary.serve.workload.lengths import Lengths


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request in numbers: when it comes (ns), and how many tokens its prompt and its answer have."""

    at: int
    prompt: int
    answer: int


def in_order(requests: Iterable[Request]) -> Iterator[tuple[int, Request]]:
    """Each request with its arrival (ns; without one, that of the one before it). Raises InputError for one that arrives before the one before it."""
    before = 0
    for request in requests:
        at = request.arrival if request.arrival is not None else before
        if at < before:
            raise InputError(f"request '{request.id}' arrives before the one ahead of it", "sort the workload by arrival", field="arrival")
        before = at
        yield at, request


def arrivals(times: Iterable[int], lengths: Lengths, count: int, seed: int = 0, limit: int | None = None) -> Iterator[Arrival]:
    """`count` of them."""
    pairs = lengths.draw(seed, limit)
    return (Arrival(at, prompt, answer) for at, (prompt, answer) in zip(islice(times, count), pairs, strict=False))


def requests(coming: Iterable[Arrival], prefix: str = "") -> Iterator[Request]:
    """Requests of blank tokens, whose answers have exactly the length that is given; each of a tenant of its own, so that none begins as another."""
    kept: dict[int, SamplingParams] = {}  # thousands ask for the same
    for number, one in enumerate(coming):
        params = kept.get(one.answer)
        if params is None:
            params = kept[one.answer] = SamplingParams(max_tokens=one.answer, temperature=0.0, ignore_eos=True)
        name = f"{prefix}{number}"
        yield Request(name, (0,) * one.prompt, params, arrival=one.at, cache_salt=name)
