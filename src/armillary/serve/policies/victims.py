"""Who loses its KV blocks when they run out: the last admitted, or whoever costs least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from armillary.core.errors import NotFoundError
from armillary.serve.policies.entries import is_decode
from armillary.serve.request import Request
from armillary.serve.schedule import Preemption, Reason, Room, State

Lacking = Callable[[Sequence[Request]], int]
"""KV blocks that are missing when these sequences lose theirs; 0 or fewer when all is well."""

Rule = Callable[[State, Lacking], list[Request]]
"""Victims, enough that nothing is lacking. Never the first admitted: so it ends, then the next is the first, and everybody ends."""


@dataclass(frozen=True, slots=True)
class Victims:
    """A rule, and what its victims are told."""

    rule: Rule
    reason: Reason

    def choose(
        self, state: State, growth: Callable[[Sequence[Request], State], int], room: Room
    ) -> tuple[tuple[Preemption, ...], Sequence[Request]]:
        """Who is preempted, the last admitted first, and who goes on; the blocks of their `growth` are taken from `room`.

        A victim loses all its blocks and computes them again later, which is cheaper than swapping (vLLM PR #12).
        """
        needed = growth(state.running, state)
        if needed <= room.free:
            room.free -= needed
            return (), state.running

        def lacking(victims: Sequence[Request]) -> int:
            left = Room(state)
            for victim in victims:
                left.give_back(victim)
            return growth([request for request in state.running if request not in victims], state) - left.free

        victims = self.rule(state, lacking)
        reason = Reason.LOWEST_CLASS if len({request.priority for request in state.running[1:]}) > 1 else self.reason
        preempted = [Preemption(request.id, reason, room.give_back(request)) for request in reversed(state.running) if request in victims]
        kept = [request for request in state.running if request not in victims]
        room.free -= growth(kept, state)
        return tuple(preempted), kept


def last_admitted(state: State, lacking: Lacking) -> list[Request]:
    """Those who were admitted last, of the lowest class first: first come, first served, and what vLLM does."""
    order = sorted(range(1, len(state.running)), key=lambda place: (-state.running[place].priority, -place))
    victims: list[Request] = []
    while lacking(victims) > 0:
        victims.append(state.running[order[len(victims)]])
    return victims


def cheapest(state: State, lacking: Lacking) -> list[Request]:
    """Those whose loss costs least, of the lowest class first (after vLLM issue 56897), and none that could have been spared.

    A loss costs the tokens that are computed again, and more the more of its answer a sequence has. Of those who have enough
    blocks alone the one of the least cost goes; if none has, the one of the most blocks for its cost, and then again.
    """
    victims: list[Request] = []
    while (missing := lacking(victims)) > 0:
        left = [request for request in state.running[1:] if request not in victims]
        lowest = max(request.priority for request in left)
        losses = {request: _loss(request, state) for request in left if request.priority == lowest}
        enough = [request for request, (blocks, _) in losses.items() if blocks >= missing]
        if enough:
            victims.append(min(enough, key=lambda request: losses[request][1]))
        else:
            victims.append(max(losses, key=lambda request: losses[request][0] / losses[request][1]))
    for request in victims[:-1]:  # one that came later may have been enough for both
        fewer = [victim for victim in victims if victim is not request]
        if lacking(fewer) <= 0:
            victims = fewer
    return victims


def _loss(request: Request, state: State) -> tuple[int, float]:
    """The KV blocks that are there for others without `request`, and the cost of losing them."""
    limits = state.limits
    own = sum(state.memory.references(block) == 1 for block in request.blocks)
    wanted = max(0, limits.blocks_for(request.known) - len(request.blocks)) if is_decode(request) else 0
    again = request.computed - (len(request.blocks) - own) * limits.block_size  # what others hold is found again
    unanswered = 1 - len(request.output) / max(1, request.sampling.max_tokens)
    return own + wanted, max(1, again) / max(unanswered, 1 / (1 + request.max_length))


DEFAULT: Final = "last"
LAST: Final = Victims(last_admitted, Reason.MAKE_ROOM)
_VICTIMS: Final = {DEFAULT: LAST, "cost": Victims(cheapest, Reason.CHEAPEST)}


def get(name: str) -> Victims:
    """A rule by name. Raises NotFoundError."""
    if name not in _VICTIMS:
        raise NotFoundError(f"no choice of victims is called '{name}'", f"use one of: {', '.join(_VICTIMS)}", field="victim")
    return _VICTIMS[name]
