"""Beam search: the `width` likeliest continuations are carried on together; each is a fork of the one that it grew from."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from armillary.core.errors import InputError
from armillary.serve.request import Request, SamplingParams


@dataclass(frozen=True, slots=True)
class BeamParams:
    """`length_penalty` p ranks an ended beam of n tokens by its log-probability / n^p: above 0 favours long answers, as in transformers."""

    width: int = 4
    max_tokens: int = 64
    length_penalty: float = 1.0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        for name, value, low, high in (("width", self.width, 1, 64), ("max_tokens", self.max_tokens, 1, 1 << 20)):
            if not low <= value <= high:
                raise InputError(f"{name} is {value}", f"give a number from {low} to {high:,}", field=name)
        if not -10.0 <= self.length_penalty <= 10.0:
            raise InputError(f"length_penalty is {self.length_penalty}", "give a number from -10 to 10", field="length_penalty")


@dataclass(frozen=True, slots=True)
class Beam:
    """The tokens of an answer, its end-of-text token included where it has one, and their log-probability together."""

    tokens: tuple[int, ...]
    logprob: float
    score: float = -math.inf  # once it has ended: by what it is ranked


@dataclass(slots=True)
class BeamSearch:
    """The search for one prompt, a step at a time: compute `requests()`, then `advance(...)` with them, until `done`.

    A request computes one token of one beam. It begins with the keys and values of the beam that it continues: whole blocks are shared,
    the last is copied (`Request.retained`, `Request.parent`), so a step computes `width` tokens whatever the length.
    Each beam's 2 x `width` likeliest tokens are candidates, so `width` are left when the others end.
    """

    name: str
    prompt: tuple[int, ...]
    params: BeamParams
    eos_ids: Collection[int]
    live: list[tuple[Beam, Request | None]] = field(default_factory=list)
    ended: list[Beam] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        self.live = [(Beam((), 0.0), None)]

    @property
    def done(self) -> bool:
        """No beam is alive, or none can come to stand above the ended ones (as `early_stopping=False` of transformers)."""
        if not self.live:
            return True
        if len(self.ended) < self.params.width:
            return False
        best = max(beam.logprob for beam, _ in self.live)
        longest = self.params.max_tokens if self.params.length_penalty > 0 else self.step
        return self.ended[-1].score >= best / longest**self.params.length_penalty

    def requests(self) -> list[Request]:
        """One for each live beam, to be submitted together."""
        sampling = SamplingParams(1, temperature=0.0, ignore_eos=True, logprobs=2 * self.params.width)
        return [
            Request(f"{self.name}/{self.step}.{place}", self.prompt + beam.tokens, sampling, parent=parent, retained=True)
            for place, (beam, parent) in enumerate(self.live)
        ]

    def advance(self, requests: Sequence[Request]) -> list[Request]:
        """Choose who goes on from what `requests()` found. Returns the requests whose blocks nobody needs any more."""
        width, self.step = self.params.width, self.step + 1
        candidates = [
            (beam.logprob + logprob, token, beam, request)
            for (beam, _), request in zip(self.live, requests, strict=True)
            for token, logprob in request.logprobs[-1].top
        ]
        candidates.sort(key=lambda one: (-one[0], one[3].number, one[1]))
        before = [parent for _, parent in self.live if parent is not None]
        self.live = []
        for place, (logprob, token, beam, request) in enumerate(candidates):
            tokens = (*beam.tokens, token)
            if token in self.eos_ids and not self.params.ignore_eos:
                if place < width:  # one that stands lower would not have been chosen
                    self._end(tokens, logprob)
            elif len(self.live) < width:
                self.live.append((Beam(tokens, logprob), request))
            if len(self.live) == width:
                break
        if self.step == self.params.max_tokens:
            for beam, _ in self.live:
                self._end(beam.tokens, beam.logprob)
            self.live = []
        needed = {id(request) for _, request in self.live}
        return [*before, *(request for request in requests if id(request) not in needed)]

    def _end(self, tokens: tuple[int, ...], logprob: float) -> None:
        self.ended.append(Beam(tokens, logprob, logprob / len(tokens) ** self.params.length_penalty))
        self.ended.sort(key=lambda beam: -beam.score)
        del self.ended[self.params.width :]
