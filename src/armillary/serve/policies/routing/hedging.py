"""Whether a request that has no token yet is also sent to a second replica (Dean and Barroso, "The Tail at Scale", CACM 2013)."""

from __future__ import annotations

from dataclasses import dataclass

from armillary.core.units import format_duration


@dataclass(frozen=True, slots=True)
class HedgeState:
    """A request without a first token. Durations in ns; `late` is the 95th percentile of its class, None while too few have been seen.

    `spent` of `admitted` prompt tokens so far were sent a second time. `utilisation`: the share of the fleet's seats that are taken.
    `free`: another replica takes requests and has nobody waiting.
    """

    waited: int
    late: int | None
    cost: int  # prompt tokens
    spent: int
    admitted: int
    utilisation: float
    free: bool


@dataclass(frozen=True, slots=True)
class Hedge:
    """Whether to `send` it a second time, whether it is `late`, and why in words."""

    send: bool
    late: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Hedging:
    """Hedges what is later than 95 % of its class, while that costs at most `budget` of all prompt tokens and seats are free.

    At the 95th percentile 5 % of the requests are sent twice by definition; the budget counts tokens, because the late ones are the long ones.
    """

    budget: float = 0.05
    utilisation: float = 0.7

    def step(self, state: HedgeState) -> Hedge:
        if state.late is None or state.waited <= state.late:
            return Hedge(False, False, "it is not late")
        late = f"no token after {format_duration(state.waited)}, and 95 % of its class have one after {format_duration(state.late)}"
        if not state.free:
            return Hedge(False, True, f"{late}, but every other replica has a queue")
        if state.utilisation > self.utilisation:
            return Hedge(False, True, f"{late}, but {state.utilisation:.0%} of the fleet's seats are taken")
        if state.spent + state.cost > self.budget * state.admitted:
            return Hedge(False, True, f"{late}, but {state.spent:,} of {state.admitted:,} prompt tokens were sent twice already")
        return Hedge(True, True, late)
