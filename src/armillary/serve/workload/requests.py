"""From arrivals and lengths to requests."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

from armillary.core.errors import InputError
from armillary.serve.request import Request, SamplingParams

if TYPE_CHECKING:
    from armillary.serve.workload.lengths import Lengths


Content = tuple[tuple[int, int], ...]
"""Runs of (identity, tokens)."""

_SHARED: Final = 2048  # tokens: blank prompts of up to so many are kept, 17 MB all together


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request in numbers: when it comes (ns), and how many tokens its prompt and its answer have.

    `content` are runs of (identity, tokens) that make up the prompt, where it may begin as others do: its first `shared` tokens as one before it.
    The tokens of answers have the identity 0. Without a `name` it has its number.
    """

    at: int
    prompt: int
    answer: int
    name: str = ""
    content: Content = ()
    shared: int = 0

    def within(self, limit: int) -> Arrival:
        """With at most `limit` tokens: of what exceeds them the answer is cut, then the prompt."""
        if self.prompt + self.answer <= limit:
            return self
        prompt = min(self.prompt, limit - 1)
        content, shared = beginning(self.content, prompt), min(self.shared, prompt)
        return replace(self, prompt=prompt, answer=min(self.answer, limit - prompt), content=content, shared=shared)


def beginning(content: Content, tokens: int) -> Content:
    """The first `tokens` tokens, or all of them."""
    found: list[tuple[int, int]] = []
    for identity, count in content:
        if tokens <= 0:
            break
        found.append((identity, min(count, tokens)))
        tokens -= count
    return tuple(found)


@runtime_checkable
class Source(Protocol):
    """Requests in the order of their arrival, some of which may come because others have ended."""

    @property
    def next_time(self) -> int | None:
        """When the next one comes, ns, as far as is known; None when none does unless one that has come ends."""
        ...

    def take(self) -> Request:
        """The next one."""
        ...

    def ended(self, request: Request) -> None:
        """One that came is over; what comes of it comes no earlier than that."""
        ...


class Listed:
    """`Source` of requests that come whatever becomes of others, taken one by one. Raises as `in_order`."""

    def __init__(self, requests: Iterable[Request]) -> None:
        self._coming = in_order(requests)
        self._following = next(self._coming, None)
        self.next_time = self._following[0] if self._following is not None else None

    def take(self) -> Request:
        assert self._following is not None
        request = self._following[1]
        self._following = next(self._coming, None)
        self.next_time = self._following[0] if self._following is not None else None
        return request

    def ended(self, request: Request) -> None:
        """Nothing comes of it."""


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
    """`count` of them. Raises InputError where even the shortest are over `limit`."""
    prompt, answer = lengths.prompt[0], lengths.answer[0]
    if limit is not None and prompt + answer > limit:
        raise InputError(
            f"prompts of {prompt:,.0f} and answers of {answer:,.0f} tokens are more than the context of {limit:,}",
            "give shorter ones, or a model with a longer context",
            field="lengths",
        )
    pairs = lengths.draw(seed, limit)
    return (Arrival(at, prompt, answer) for at, (prompt, answer) in zip(islice(times, count), pairs, strict=False))


def requests(coming: Iterable[Arrival], prefix: str = "") -> Iterator[Request]:
    """Requests whose answers have exactly the length that is given. One without content has blank tokens, and is of a tenant of its own, so that
    it begins as no other."""
    kept: dict[int, SamplingParams] = {}  # thousands ask for the same ...
    blanks: dict[int, tuple[int, ...]] = {}  # ... and are as long as others
    for number, one in enumerate(coming):
        params = kept.get(one.answer)
        if params is None:
            params = kept[one.answer] = SamplingParams(max_tokens=one.answer, temperature=0.0, ignore_eos=True)
        name = one.name or f"{prefix}{number}"
        if one.content:
            yield Request(name, tuple(chain.from_iterable(repeat(*run) for run in one.content)), params, arrival=one.at)
        else:
            prompt = blanks.get(one.prompt)
            if prompt is None:
                prompt = (0,) * one.prompt
                if one.prompt <= _SHARED:
                    blanks[one.prompt] = prompt
            yield Request(name, prompt, params, arrival=one.at, cache_salt=name)
