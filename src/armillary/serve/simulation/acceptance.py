"""How often drafts are right: a property of the workload, decided for each token by the request's own random number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from armillary.core.errors import InputError
from armillary.serve.request import Request
from armillary.serve.speculation.adaptive import Adaptive
from armillary.serve.workload.draws import uniform

_SPELLED: Final = re.compile(r"([0-9.]{1,12}(?:,[0-9.]{1,12}){0,63})(?:@([0-9.]{1,12}))?")


@dataclass(frozen=True, slots=True)
class Acceptance:
    """`rates[i]`: how often the i-th draft of a pass is right where all before it are; the last rate goes on.

    In one number it is Leviathan et al.'s acceptance rate; in several it can be any distribution of accepted lengths. `found`: in how
    many passes anything is proposed at all, for proposers that look for something (n-grams).

    `again`: the same of a pass whose predecessor's drafts were all right, for texts that repeat themselves for a while; by default no different.

    Whether a token can be foreseen is decided by a hash of the seed, the request and the position. So it is the same however many
    tokens are drafted and whatever the schedule is, and a higher rate is right wherever a lower one is.
    """

    rates: tuple[float, ...]
    found: float = 1.0
    again: Acceptance | None = None

    def __post_init__(self) -> None:
        if not self.rates or not all(0.0 <= rate <= 1.0 for rate in (*self.rates, self.found)):
            raise InputError(
                f"drafts that are right at rates of {', '.join(f'{rate:g}' for rate in self.rates) or 'nothing'}, found at {self.found:g}",
                "give shares from 0 to 1, such as 0.7",
                field="acceptance",
            )

    def right(self, request: Request, position: int, place: int, seed: int, again: bool = False) -> bool:
        """Whether the draft for `position`, the `place`-th of its pass from 0, is right where all before it are; `again`: so was the pass before."""
        rates = self.again.rates if again and self.again is not None else self.rates
        return _uniform(request, position, seed, "right") < rates[min(place, len(rates) - 1)]

    def proposed(self, request: Request, seed: int, again: bool = False) -> bool:
        """Whether anything is proposed after the request's known tokens."""
        found = self.again.found if again and self.again is not None else self.found
        return found >= 1.0 or _uniform(request, request.known, seed, "found") < found

    def expected(self, drafts: int) -> float:
        """Tokens that a pass with so many drafts is expected to yield: for one rate (1 - a^(g+1)) / (1 - a), Leviathan et al., equation 1.

        With `again` it is the mean of the two kinds of passes in the long run.
        """
        tokens, whole = self._pass(drafts)
        if self.again is None or not drafts:
            return tokens
        others, stays = self.again._pass(drafts)
        share = whole / (1.0 - stays + whole) if whole else 0.0  # of passes that follow one that was right
        return (1.0 - share) * tokens + share * others

    def _pass(self, drafts: int) -> tuple[float, float]:
        """Tokens that a pass is expected to yield by the first rates, and how often all its drafts are right."""
        whole = reach = 1.0
        for place in range(drafts):
            reach *= self.rates[min(place, len(self.rates) - 1)]
            whole += reach
        return 1.0 + self.found * (whole - 1.0), self.found * reach

    def __str__(self) -> str:
        found = f"@{self.found:g}" if self.found < 1.0 else ""
        return ",".join(f"{rate:g}" for rate in self.rates) + found + (f"+{self.again}" if self.again is not None else "")


def parse(text: str) -> Acceptance:
    """`0.7`, or a rate for the first, second, ... and all later drafts of a pass (`0.6,0.8`), and in what share of passes there are any (`0.6,0.8@0.5`);
    behind a `+` the same of passes that follow one that was right.

    Raises InputError for anything else.
    """
    parts = text.strip().split("+")
    matches = [_SPELLED.fullmatch(part) for part in parts]
    found: Acceptance | None = None
    try:
        for match in reversed(matches):
            if match is None or len(matches) > 2:
                raise ValueError
            found = Acceptance(tuple(float(rate) for rate in match[1].split(",")), float(match[2] or 1.0), found)
    except ValueError:
        found = None
    if found is None:
        raise InputError(
            f"an acceptance of {text[:80]!r}", "write a share such as 0.7, or of each draft of a pass 0.6,0.8", field="acceptance"
        )
    return found


class Observed:
    """A drafter, and how long what it proposed was and how much of that was right: what an `Acceptance` is measured by."""

    def __init__(self, inner: Adaptive) -> None:
        self._inner = inner
        self.name = inner.name
        self.passes: dict[str, list[tuple[int, int]]] = {}  # (drafted, accepted), of those for which drafts were wanted

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> Sequence[tuple[int, ...]]:
        proposed = self._inner.propose(requests, most)
        for request, length, tokens in zip(requests, self._inner.lengths, proposed, strict=True):
            if length and not tokens:
                self.passes.setdefault(request.id, []).append((0, 0))
        return proposed

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        self.passes.setdefault(request.id, []).append((drafted, accepted))
        self._inner.verified(request, drafted, accepted)


def measured(answers: Iterable[Sequence[tuple[int, int]]], places: int = 8) -> Acceptance:
    """The rates of (drafted, accepted) passes, answer by answer, of the first `places` drafts each and of all later ones together; apart for passes
    that follow one whose drafts were all right."""
    kinds: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for passes in answers:
        right = False
        for drafted, accepted in passes:
            kinds[right].append((drafted, accepted))
            right = 0 < drafted == accepted
    first, again = (_rates(passes, places) for passes in kinds)
    return replace(first, again=again) if kinds[True] else first


def _rates(passes: Sequence[tuple[int, int]], places: int) -> Acceptance:
    """A place that nothing reached has the rate of the one before it."""
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
    found = sum(drafted > 0 for drafted, _ in passes)
    return Acceptance(tuple(rates), found / len(passes) if passes else 1.0)


def _uniform(request: Request, position: int, seed: int, purpose: str) -> float:
    """In [0, 1), 53 bits; a request with a seed of its own has its own numbers."""
    own = request.sampling.seed
    key = f"{seed} {request.id}" if own is None else f"seed {own}"
    return uniform(f"{key} {position} {purpose}")
