"""Which adapter a request asks for: a few are asked for often, most seldom (S-LoRA, Sheng et al., MLSys 2024, section 7.1)."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate

from armillary.core.errors import InputError
from armillary.serve.request import Request
from armillary.serve.workload.draws import uniform
from armillary.serve.workload.requests import Source

MOST = 100_000


class Popularity:
    """`count` adapters, the i-th of which is asked for in proportion to i ** -`skew`: 0 is evenly, 1 is Zipf's law. A conversation keeps its own."""

    def __init__(self, count: int, skew: float = 1.0, seed: int = 0) -> None:
        if not 1 <= count <= MOST:
            raise InputError(f"{count:,} adapters", f"give 1 to {MOST:,}", field="adapters")
        if not 0 <= skew <= 10:
            raise InputError(f"adapters whose popularity falls by a power of {skew:g}", "give 0 (evenly) to 10", field="adapter_skew")
        self._below = list(accumulate(rank**-skew for rank in range(1, count + 1)))
        self._seed = seed

    def of(self, request: Request) -> str:
        place = bisect_right(self._below, uniform(f"{self._seed} {request.session or request.id} adapter") * self._below[-1])
        return f"adapter {min(place, len(self._below) - 1) + 1}"

    def each(self, requests: Iterable[Request]) -> Iterator[Request]:
        """`requests`, each with its adapter."""
        for request in requests:
            request.adapter = self.of(request)
            yield request


class Adapted:
    """A `Source` whose requests have adapters."""

    def __init__(self, inner: Source, popularity: Popularity) -> None:
        self._inner, self._popularity = inner, popularity

    @property
    def next_time(self) -> int | None:
        return self._inner.next_time

    def take(self) -> Request:
        request = self._inner.take()
        request.adapter = self._popularity.of(request)
        return request

    def ended(self, request: Request) -> None:
        self._inner.ended(request)
