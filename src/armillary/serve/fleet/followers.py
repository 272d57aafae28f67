"""Choices of one answer: where the first of them computes the prompt, the others share it by forks as in one engine."""

from __future__ import annotations

from armillary.serve.fleet.member import Attempt, Ticket


def beside(ticket: Ticket) -> Attempt | None:
    """The attempt of its parent on a replica that takes requests, which has or will have the prompt; None where there is none.

    An answer whose keys and values wait to be fetched goes on wherever there is room.
    """
    parent = living(ticket)
    if parent is None or ticket.held is not None:
        return None
    return next((one for one in parent.attempts if one.member.health in ("open", "slow")), None)


def living(ticket: Ticket) -> Ticket | None:
    """Its parent, unless that has ended."""
    parent = ticket.parent
    return parent if parent is not None and parent.request.finish_reason is None else None


def undecided(parent: Ticket) -> bool:
    """Whether it is still to be seen where the prompt's keys and values will be: who starts a tied request, who goes on with a prefilled one."""
    if not parent.attempts:
        return parent.homeless or parent.follows
    first = parent.attempts[0]
    return (first.tied and not first.granted) or (first.stage == "prefill" and hands_over(parent))


def hands_over(ticket: Ticket) -> bool:
    """Whether a prefill worker leaves its keys and values for a decode worker: where more than one token is to come."""
    return ticket.request.sampling.max_tokens - len(ticket.request.output) > 1


class Followers:
    """Those that wait for their parent's replica to be known, by the parent, in the order in which they came."""

    def __init__(self) -> None:
        self._waiting: dict[str, list[Ticket]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def add(self, ticket: Ticket) -> Ticket | None:
        """The parent that it waits for from now on; None when it need not."""
        parent = living(ticket)
        if parent is None or ticket.held is not None or not undecided(parent):
            return None
        ticket.follows, ticket.homeless = True, False
        self._waiting.setdefault(parent.request.id, []).append(ticket)
        self._count += 1
        return parent

    def release(self, parent: Ticket) -> list[Ticket]:
        """Those that waited for `parent` and wait no longer, now that it is known where it goes on."""
        released = [] if undecided(parent) else self._waiting.pop(parent.request.id, [])
        for ticket in released:
            ticket.follows = False
        self._count -= len(released)
        return released

    def drop(self, ticket: Ticket) -> None:
        """It has ended."""
        if ticket.follows and ticket.parent is not None:
            self._waiting[ticket.parent.request.id].remove(ticket)
            ticket.follows = False
            self._count -= 1
