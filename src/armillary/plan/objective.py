"""What users shall feel: bounds on the waits of a request, and the share of requests that must keep all of them (an SLO)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from armillary.core.errors import InputError
from armillary.core.units import MS, format_duration, parse_duration
from armillary.serve.simulation.recorder import Result

KEYS: Final = {"ttft": "first_token", "tpot": "per_token", "wait": "wait"}
_FIX: Final = "write bounds such as ttft=300ms,tpot=50ms,attainment=0.9 (wait= bounds the time in the queue)"


@dataclass(frozen=True, slots=True)
class Objective:
    """ns; None is no bound. `first_token` from arrival (TTFT), `per_token` on average after it (TPOT), `wait` until the first iteration.

    A request keeps the objective when it keeps every bound; `attainment` is the share of requests that must.
    """

    first_token: int | None = None
    per_token: int | None = None
    wait: int | None = None
    attainment: float = 0.9

    def __post_init__(self) -> None:
        for name, bound in self.bounds.items():
            if bound <= 0:
                raise InputError(f"{name} of at most {bound} ns is impossible", _FIX, field="slo")
        if not self.bounds:
            raise InputError("an objective without bounds is always met", _FIX, field="slo")
        if not (math.isfinite(self.attainment) and 0 < self.attainment <= 1):
            raise InputError(f"an attainment of {self.attainment:g} is no share of requests", "give more than 0, at most 1", field="slo")

    @property
    def bounds(self) -> dict[str, int]:
        """Those that there are, by the names that users write."""
        given = {key: getattr(self, name) for key, name in KEYS.items()}
        return {key: bound for key, bound in given.items() if bound is not None}

    @property
    def longest_wait(self) -> int:
        """The longest that a request may wait for its first token; 0 where nothing bounds it."""
        return min((bound for bound in (self.first_token, self.wait) if bound is not None), default=0)

    @property
    def percentile(self) -> str:
        """That of a measure by itself which the share of requests asks for: p90."""
        return f"p{100 * self.attainment:g}"

    def met(self, result: Result) -> float:
        """The share of requests that keep every bound."""
        return result.attainment(self.first_token, self.per_token, self.wait)

    def each(self, result: Result) -> dict[str, float]:
        """The share of requests that keep each bound alone."""
        return {key: result.attainment(**{KEYS[key]: bound}) for key, bound in self.bounds.items()}

    @property
    def text(self) -> str:
        """As `parse` reads it."""
        bounds = [f"{key}={bound // MS}ms" if bound % MS == 0 else f"{key}={bound}ns" for key, bound in self.bounds.items()]
        return ",".join([*bounds, f"attainment={self.attainment!r}"])

    def __str__(self) -> str:
        bounds = [f"{key} {format_duration(bound)}" for key, bound in self.bounds.items()]
        return f"{', '.join(bounds)} for {self.attainment:.4g} of the requests"


def parse(text: str) -> Objective:
    """`ttft=300ms,tpot=50ms,attainment=0.9`. Raises InputError naming what is wrong."""
    given: dict[str, int | float] = {}
    for part in text.split(","):
        key, sign, value = (piece.strip() for piece in part.partition("="))
        name = "attainment" if key == "attainment" else KEYS.get(key)
        if not (sign and value) or name is None:
            raise InputError(f"{part.strip()[:80]!r} is no part of an objective", _FIX, field="slo")
        if name in given:
            raise InputError(f"the objective names {key} twice", "give each bound once", field="slo")
        try:
            given[name] = float(value) if name == "attainment" else parse_duration(value)
        except InputError as error:
            raise InputError(f"{key}: {error.problem}", error.fix, field="slo") from None
        except ValueError:
            raise InputError(f"an attainment of {value[:40]!r} is no number", _FIX, field="slo") from None
    return Objective(**given)  # type: ignore[arg-type]
