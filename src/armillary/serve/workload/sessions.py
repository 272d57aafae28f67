"""Conversations: sessions of several turns, each of which asks with all that was said before it, some time after it was answered."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from typing import Final

import numpy as np

from armillary.core.errors import InputError
from armillary.core.units import parse_duration
from armillary.serve.request import Request, SamplingParams
from armillary.serve.workload.lengths import Lengths

_MOST_TURNS: Final = 10_000


@dataclass(frozen=True, slots=True)
class Amount:
    """A number that differs: without memory about its mean (`low` is None), or evenly from `low` to `high`."""

    low: float | None
    high: float

    @property
    def mean(self) -> float:
        return self.high if self.low is None else (self.low + self.high) / 2


def turns(text: str) -> Amount:
    """`5` for five on average (after each answer the user goes on with the same chance), `2..6` for as many as that, `5..5` for five. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,5}(?:\.[0-9]{1,6})?)(?:\.\.([0-9]{1,5}))?", text.strip())
    if found is not None:
        low, high = float(found[1]), float(found[2]) if found[2] else None
        if 1 <= low <= (high or low) <= _MOST_TURNS and (high is None or low.is_integer()):
            return Amount(None, low) if high is None else Amount(low, high)
    raise InputError(
        f"{text[:80]!r} turns are no session",
        f"give their mean, such as 5, or bounds such as 2..6, from 1 to {_MOST_TURNS:,}",
        field="turns",
    )


def think(text: str) -> Amount:
    """`20s` for a mean of exponential times, `5s..1min` for anything between them; ns. Raises InputError."""
    low, dots, high = text.partition("..")
    try:
        if not dots:
            return Amount(None, parse_duration(low))
        found = Amount(parse_duration(low), parse_duration(high))
    except InputError as error:
        raise InputError(error.problem, "give a mean, such as 20s, or bounds such as 5s..1min", field="think") from None
    if found.low is not None and found.low > found.high:
        raise InputError(f"think times from {low} to {high}", "give the shorter one first", field="think")
    return found


def system_prompt(text: str) -> tuple[int, int]:
    """(tokens, different ones): `1000` for one that all sessions begin with, `1000x8` for eight, one of which each session has. Raises InputError."""
    found = re.fullmatch(r"([0-9]{1,9})(?:x([0-9]{1,9}))?", text.strip())
    if found is None or int(found[2] or 1) < 1:
        raise InputError(
            f"{text[:80]!r} is no system prompt", "give its tokens, such as 1000, or 1000x8 for eight different ones", field="system_prompt"
        )
    return int(found[1]), int(found[2] or 1)


@dataclass(frozen=True, slots=True)
class Sessions:
    """What sessions are like. `lengths` are of a turn: the user's new tokens, the answer's.

    A turn's prompt is the system prompt, all turns and answers before it, and the new tokens; it comes `think` ns after the answer before it
    has ended. With `kinds` of system prompts each session has one of them, picked at random.
    """

    lengths: Lengths
    turns: Amount
    think: Amount
    system_tokens: int = 0
    kinds: int = 1


@dataclass(slots=True)
class _Session:
    """One of them: what has been said, and what is yet to be asked."""

    number: int
    said: tuple[int, ...]
    asks: list[tuple[int, int]]  # (user's tokens, answer's) of each turn that is left, the last one first
    thinks: list[int]  # ns before each but the first, the last one first
    turn: int = 0


class Conversations:
    """A `Source`: sessions begin at `times`, and each turn comes after the answer before it.

    Everything is drawn from the seed in the order in which sessions begin, so that two simulations in which answers take different times are
    asked the same. Tokens are numbers that say whose they are: a session's own, a system prompt's; so prompts begin alike where
    conversations do, and nowhere else. A session whose next turn would not fit in `context` ends there, and `cut` counts those.

    At most `count` sessions begin, and `most` requests come. `shared` counts the prompt tokens that were asked or answered before, of `asked`.
    """

    def __init__(
        self, times: Iterator[int], like: Sessions, *, context: int, seed: int = 0, count: int | None = None, most: int | None = None
    ) -> None:
        if like.system_tokens + 2 > context:
            raise InputError(
                f"a system prompt of {like.system_tokens:,} tokens leaves no room in a context of {context:,}",
                "give a shorter one",
                field="system_prompt",
            )
        self.like, self.context = like, context
        self.asked = self.shared = self.cut = self.begun = 0
        self._times = islice(times, count)
        self._most = most
        self._generator = np.random.default_rng(seed + 1)
        self._lengths = like.lengths.draw(seed, context - like.system_tokens)
        self._known: set[int] = set()  # system prompts that somebody had
        self._params: dict[int, SamplingParams] = {}
        self._coming: list[tuple[int, int, _Session]] = []  # (ns, order, session)
        self._talking: dict[str, _Session] = {}  # by the request that is being answered
        self._order = self._opened = 0
        self._open()

    @property
    def next_time(self) -> int | None:
        """When the next request comes, ns, as far as is known; None when none does unless an answer ends."""
        return self._coming[0][0] if self._coming else None

    def take(self) -> Request:
        """The next request."""
        at, _, session = heappop(self._coming)
        if not session.turn:
            self.begun += 1
            self._open()
        user, answer = session.asks.pop()
        prompt = (*session.said, *(session.number + 1,) * user)
        kind = session.said[0] if session.said else 0
        self.asked += len(prompt)
        self.shared += len(session.said) if session.turn or kind in self._known else 0
        self._known.add(kind)
        session.turn += 1
        params = self._params.get(answer)
        if params is None:
            params = self._params[answer] = SamplingParams(max_tokens=answer, temperature=0.0, ignore_eos=True)
        name = f"{session.number}.{session.turn}"
        self._talking[name] = session
        if self._most is not None:
            self._most -= 1
            if not self._most:
                self._coming.clear()
        return Request(name, prompt, params, arrival=at, session=str(session.number))

    def ended(self, request: Request) -> None:
        """A request is over: its session goes on, or ends."""
        session = self._talking.pop(request.id)
        if not session.asks or self._most == 0:
            return
        assert request.finished is not None
        session.said = (*request.prompt, *request.output)
        if len(session.said) + sum(session.asks[-1]) > self.context:
            self.cut += 1
            return
        self._await(request.finished + session.thinks.pop(), session)

    def _open(self) -> None:
        """The session that begins next."""
        at = next(self._times, None)
        if at is None or self._most == 0:
            return
        like, draw = self.like, self._generator
        law = like.turns
        count = min(_MOST_TURNS, int(draw.geometric(1 / law.mean) if law.low is None else draw.integers(int(law.low), int(law.high) + 1)))
        asks = list(islice(self._lengths, count))[::-1]
        thinks = (
            draw.exponential(like.think.mean, count) if like.think.low is None else draw.uniform(like.think.low, like.think.high, count)
        )
        said = (-1 - int(draw.integers(like.kinds)),) * like.system_tokens
        self._await(at, _Session(self._opened, said, asks, np.rint(thinks).astype(np.int64).tolist()))
        self._opened += 1

    def _await(self, at: int, session: _Session) -> None:
        heappush(self._coming, (at, self._order, session))
        self._order += 1
