"""How often drafts are right: a property of the workload, decided for each token by the request's own random number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from armillary.core.errors import InputError
from armillary.serve.request import Request
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.workload.draws import uniform

_SPELLED: Final = re.compile(r"(?P<rates>[0-9.]{1,12}(,[0-9.]{1,12}){0,63})(@(?P<found>[0-9.]{1,12}))?")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`rates[i]`: how often the i-th draft of a pass is right where all before it are; the last rate goes on.

    In one number it is Leviathan et al.'s acceptance rate; in several it can be any distribution of accepted lengths. `found`: in how
    many passes anything is proposed at all, for proposers that look for something (n-grams).

    Whether a token can be foreseen is decided by a hash of the seed, the request and the position. So it is the same however many
    tokens are drafted and whatever the schedule is, and a higher rate is right wherever a lower one is.
    """

    rates: tuple[float, ...]
    found: float = 1.0

    def __post_init__(self) -> None:
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in (*self.rates, self.found)):
            raise InputError(
                f"drafts that are right at rates of {', '.join(f'{rate:g}' for rate in self.rates) or 'nothing'}, found at {self.found:g}",
                "give shares from 0 to 1, such as 0.7",
                field="acceptance",
            )

    def right(self, request: Request, position: int, place: int, seed: int) -> bool:
        """Whether the draft for `position`, the `place`-th of its pass from 0, is right where all before it are."""
        return _uniform(request, position, seed, "right") < self.rates[min(place, len(self.rates) - 1)]

    def proposed(self, request: Request, seed: int) -> bool:
        """Whether anything is proposed after the request's known tokens."""
        return self.found >= 1.0 or _uniform(request, request.known, seed, "found") < self.found

    def expected(self, drafts: int) -> float:
        """Tokens that a pass with so many drafts is expected to yield: for one rate (1 - a^(g+1)) / (1 - a), Leviathan et al., equation 1."""
        whole = reach = 1.0
        for place in range(drafts):
            reach *= self.rates[min(place, len(self.rates) - 1)]
            whole += reach
        return 1.0 + self.found * (whole - 1.0)

    def __str__(self) -> str:
        found = f"@{self.found:g}" if self.found < 1.0 else ""
        return ",".join(f"{rate:g}" for rate in self.rates) + found


def parse(text: str) -> Acceptance:
    """`0.7`, or a rate for the first, second, ... and all later drafts of a pass (`0.6,0.8`), and in what share of passes there are any (`0.6,0.8@0.5`).

    Raises InputError for anything else.
    """
    match = _SPELLED.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        rates, found = tuple(float(rate) for rate in match["rates"].split(",")), float(match["found"] or 1.0)
    except ValueError:
        raise InputError(
            f"an acceptance of {text[:80]!r}", "write a share such as 0.7, or of each draft of a pass 0.6,0.8", field="acceptance"
        ) from None
    return Acceptance(rates, found)


class Observed:
    """A drafter, and how long what it proposed was and how much of that was right: what an `Acceptance` is measured by."""

    def __init__(self, inner: Adaptive) -> None:
        self._inner = inner
        self.name = inner.name
        self.without: dict[str, int] = {}  # passes in which drafts were wanted and there were none
        self.passes: dict[str, list[tuple[int, int]]] = {}  # of the others (drafted, accepted)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[tuple[int, ...]]:
        proposed = self._inner.propose(requests, most)
        for request, length, tokens in zip(requests, self._inner.lengths, proposed, strict=True):
            self.without[request.id] = self.without.get(request.id, 0) + (length > 0 and not tokens)
        return proposed

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        self.passes.setdefault(request.id, []).append((drafted, accepted))
        self._inner.verified(request, drafted, accepted)


def measured(passes: Sequence[tuple[int, int]], without: int = 0, places: int = 8) -> Acceptance:
    """The rates of (drafted, accepted) passes, of the first `places` drafts each and of all later ones together; `without`: passes that had none.

    A place that nothing reached has the rate of the one before it.
    """
    tried, right = [0] * places, [0] * places
    for drafted, accepted in passes:
        for place in range(min(drafted, accepted + 1)):
            tried[min(place, places - 1)] += 1
            right[min(place, places - 1)] += place < accepted
    rates: list[float] = []
    for count, good in zip(tried, right, strict=True):
        rates.append(good / count if count else rates[-1] if rates else 0.0)
    while len(rates) > 1 and rates[-1] == rates[-2]:
        rates.pop()
    every = len(passes) + without
    return Acceptance(tuple(rates), len(passes) / every if every else 1.0)


def _uniform(request: Request, position: int, seed: int, purpose: str) -> float:
    """In [0, 1), 53 bits; a request with a seed of its own has its own numbers."""
    own = request.sampling.seed
    key = f"{seed} {request.id}" if own is None else f"seed {own}"
    return uniform(f"{key} {position} {purpose}")
