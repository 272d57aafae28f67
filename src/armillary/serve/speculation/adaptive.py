"""A proposer told how many tokens are worth proposing, from what was accepted and what iterations cost so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from armillary.core.clock import Clock, RealClock
from armillary.serve.request import Request
from armillary.serve.speculation.drafter import Proposer
from armillary.serve.speculation.length import best_lengths

if TYPE_CHECKING:
    from torch import Tensor

PRIOR = 0.6  # acceptance where nothing is known: what the papers report for unlike texts ...
PRIOR_TOKENS = 2.0  # ... and how many tokens' evidence that is worth
MEMORY = 0.95  # of what was seen, kept from one verification to the next: answers change their ways
RECOVERY = 0.98  # the same while nothing is proposed: after a time it is tried again
WINDOW = 0.97  # of past iterations' weight in the cost of the next
GUESSED_SLOPE = 0.05  # an iteration's cost a token, as a share of its fixed cost, until iterations of several sizes were seen


@dataclass(slots=True)
class _Evidence:
    accepted: float = 0.0
    tried: float = 0.0

    @property
    def rate(self) -> float:
        return (self.accepted + PRIOR * PRIOR_TOKENS) / (self.tried + PRIOR_TOKENS)


class IterationCost:
    """duration = fixed + per_token x tokens, by least squares over iterations that count less the longer they are past. In ns."""

    def __init__(self) -> None:
        self._weight = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, tokens: int, duration: int) -> None:
        for name, value in (("_weight", 1.0), ("_x", tokens), ("_y", duration), ("_xx", tokens * tokens), ("_xy", tokens * duration)):
            setattr(self, name, getattr(self, name) * WINDOW + value)

    def fit(self) -> tuple[float, float]:
        """(fixed, per token), neither negative; (1, GUESSED_SLOPE) before anything was seen that took time."""
        if not self._y:
            return 1.0, GUESSED_SLOPE
        mean_x, mean_y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - mean_x * mean_x
        if spread < 0.25:  # all alike
            fixed = mean_y / (1.0 + GUESSED_SLOPE * mean_x)
            return fixed, GUESSED_SLOPE * fixed
        slope = min(max((self._xy / self._weight - mean_x * mean_y) / spread, 0.0), mean_y / mean_x)
        return mean_y - slope * mean_x, slope


class Adaptive:
    """A `Drafter`: asks `proposer` for at most `longest` tokens a sequence, and for fewer or none where they do not pay."""

    def __init__(self, proposer: Proposer, longest: int, clock: Clock | None = None) -> None:
        self.name = proposer.name
        self._clock = clock if clock is not None else RealClock()
        self._proposer, self._longest = proposer, longest
        self._cost = IterationCost()
        self._per_draft = 0.0  # ns
        self._evidence: dict[str, _Evidence] = {}
        self.lengths: list[int] = []  # of the last proposals, for people who watch

    def propose(self, requests: Sequence[Request], most: Sequence[int]) -> list[tuple[int, ...]]:
        evidence = [self._evidence.setdefault(request.id, _Evidence()) for request in requests]
        fixed, per_token = self._cost.fit()
        self.lengths = best_lengths(
            [one.rate for one in evidence],
            [min(self._longest, bound) for bound in most],
            fixed=fixed,
            per_token=per_token,
            per_draft=self._per_draft,
        )
        self._proposer.prepare([request for request, length in zip(requests, self.lengths, strict=True) if length])
        begin = self._clock.now()
        proposed = list(self._proposer.propose(requests, self.lengths))
        count = sum(map(len, proposed))
        if count:
            taken = (self._clock.now() - begin) / count
            self._per_draft += (taken - self._per_draft) * (1.0 - MEMORY if self._per_draft else 1.0)
        for one, tokens in zip(evidence, proposed, strict=True):
            if not tokens:
                one.accepted, one.tried = one.accepted * RECOVERY, one.tried * RECOVERY
        return proposed

    def laws(self, request: Request) -> tuple[Tensor, ...]:
        return self._proposer.laws(request)

    def state(self) -> dict[str, Any]:
        """What people who watch see: who proposes, how many tokens at last, what is believed of acceptance and cost."""
        fixed, per_token = self._cost.fit()
        rates = [one.rate for one in self._evidence.values()]
        return {
            "proposer": self.name,
            "lengths": self.lengths[:64],
            "acceptance": sum(rates) / len(rates) if rates else None,
            "iteration_ms": {"fixed": fixed / 1e6, "per_token": per_token / 1e6, "per_draft": self._per_draft / 1e6},
        }

    def verified(self, request: Request, drafted: int, accepted: int) -> None:
        one = self._evidence.setdefault(request.id, _Evidence())
        one.accepted = one.accepted * MEMORY + accepted
        one.tried = one.tried * MEMORY + accepted + (accepted < drafted)  # what stands behind a wrong one was not tried

    def ran(self, tokens: int, duration: int) -> None:
        self._cost.observe(tokens, duration)

    def forget(self, request: Request) -> None:
        self._evidence.pop(request.id, None)
        self._proposer.forget(request)
