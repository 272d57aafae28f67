"""A second copy of a request in virtual time: sent when it is late, or waiting in two queues from the start (Dean and Barroso, CACM 2013)."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import InputError
from armillary.serve.fleet.latencies import Latencies
from armillary.serve.fleet.watch import LOOK, OLDEST
from armillary.serve.policies.routing.hedging import HedgeState, Hedging
from armillary.serve.policies.routing.state import RoutingPolicy, shortest
from armillary.serve.request import Request
from armillary.serve.schedule import Plan
from armillary.serve.simulation.cluster import Cluster, Replica
from armillary.serve.simulation.engine import Recording, VirtualEngine

Kind = Literal["none", "hedged", "tied"]


@dataclass(slots=True)
class TailStats:
    """Of a run: requests that were sent twice, whose second copy won, prompt tokens of second copies and of all, tied requests."""

    hedges: int = 0
    won: int = 0
    hedged_tokens: int = 0
    prompt_tokens: int = 0
    tied: int = 0


@dataclass(slots=True)
class _Copy:
    """A request at a replica, since `sent` ns."""

    request: Request
    replica: Replica
    sent: int


@dataclass(slots=True, eq=False)
class _Ticket:
    """A request without a token: where it is."""

    request: Request
    kind: int
    sent: int
    copies: list[_Copy] = field(default_factory=list)
    tied: Sequence[Replica] = ()  # in whose queues it waits


class Answers:
    """`Recording` of the copies that win; of the others nothing is kept."""

    def __init__(self, inner: Recording) -> None:
        self._inner = inner
        self.lost: set[int] = set()  # by identity, until they end

    def ended(self, request: Request) -> None:
        if id(request) in self.lost:
            self.lost.remove(id(request))
        else:
            self._inner.ended(request)

    def waited(self, plan: Plan, ends: NDArray[np.int64]) -> None:
        self._inner.waited(plan, ends)


class SecondCopies(Cluster):
    """Hedged: a request that is later than 95 % of its class is also sent to another replica, where the fleet's own policy says so; the first
    token wins. Tied: it waits at two replicas, outside of their engines, and the one whose next iteration could begin it takes it.

    A copy that has lost is cancelled when the iterations end that have begun, and its blocks are free. As in the fleet, those that have waited
    longest are looked at every `LOOK` ns. `answers` is the engines' recorder.
    """

    def __init__(
        self,
        engines: Sequence[VirtualEngine],
        router: RoutingPolicy,
        answers: Answers,
        *,
        seed: int = 0,
        kind: Kind = "hedged",
        hedging: Hedging | None = None,
    ) -> None:
        super().__init__(engines, router, seed=seed)
        if len(engines) < 2:
            raise InputError(f"tail {kind} sends requests to two replicas, and there is one", "give at least 2", field="replicas")
        self.stats = TailStats()
        self._kind, self._hedging = kind, hedging if hedging is not None else Hedging()
        self._answers, self._latencies = answers, Latencies()
        self._unanswered: dict[str, _Ticket] = {}  # in the order of arrival
        self._at: list[dict[str, _Copy]] = [{} for _ in engines]  # copies without a token, by replica
        self._lost: list[list[Request]] = [[] for _ in engines]  # to be cancelled at their next look
        self._queues: list[deque[_Ticket]] = [deque() for _ in engines]  # of tied requests
        self._looked: int | None = None  # when the late are next looked for

    @property
    def next_time(self) -> int | None:
        then, look = super().next_time, self._looked
        return then if look is None else look if then is None else min(then, look)

    def advance(self) -> None:
        """Iterations that end at one instant end before the late are looked for."""
        then, look = super().next_time, self._looked
        if look is not None and (then is None or look < then):
            self._look(look)
        else:
            super().advance()

    def route(self, request: Request, at: int) -> None:
        replica = self.choose(request, at)
        ticket = _Ticket(request, Latencies.class_of(request.known), at)
        self.stats.prompt_tokens += len(request.prompt)
        self._unanswered[request.id] = ticket
        if self._kind == "tied":
            others = [one.view(()) for one in self.replicas if one is not replica]
            self._tie(ticket, (replica, self.replicas[shortest(others).index]), at)
            return
        self._send(ticket, request, replica, at)
        if self._looked is None:
            self._looked = at + LOOK

    def ended(self, replica: Replica) -> None:
        now = replica.engine.clock.now()
        for copy in [one for one in self._at[replica.index].values() if one.request.first_token is not None or one.request.finish_reason]:
            self._answered(copy, now)
        for request in self._lost[replica.index]:
            replica.engine.cancel(request.id)
        self._lost[replica.index].clear()
        while (ticket := self._claimable(replica)) is not None:
            self._note(ticket, ticket.request, replica, now)
            replica.engine.submit(ticket.request)

    def _send(self, ticket: _Ticket, request: Request, replica: Replica, at: int) -> None:
        self._note(ticket, request, replica, at)
        self.give(replica, request, at)

    def _note(self, ticket: _Ticket, request: Request, replica: Replica, at: int) -> None:
        copy = _Copy(request, replica, at)
        ticket.copies.append(copy)
        self._at[replica.index][request.id] = copy

    def _answered(self, copy: _Copy, now: int) -> None:
        """The first token: the other copy, if there is one, has lost."""
        ticket = self._unanswered.pop(copy.request.id)
        self._latencies.add(ticket.kind, (copy.request.first_token or now) - ticket.sent)
        for one in ticket.copies:
            del self._at[one.replica.index][one.request.id]
            if one is not copy:
                self.stats.won += one.sent < copy.sent
                self._cancel(one, now)

    def _cancel(self, copy: _Copy, now: int) -> None:
        replica = copy.replica
        if copy.request.finish_reason is not None:
            return
        self._answers.lost.add(id(copy.request))
        if replica.leap is None:
            replica.engine.cancel(copy.request.id)
            return
        self._lost[replica.index].append(copy.request)
        self.recall(replica, now)

    def _look(self, now: int) -> None:
        """Whether those that have waited longest are to be sent again. Where nobody's second copy is within the budget, that is so until another
        request comes."""
        alone = [ticket for ticket in islice(self._unanswered.values(), OLDEST) if len(ticket.copies) == 1]
        for ticket in alone:
            self._hedge(ticket, now)
        spare = self._hedging.budget * self.stats.prompt_tokens - self.stats.hedged_tokens
        self._looked = now + LOOK if any(len(ticket.request.prompt) <= spare for ticket in alone) else None

    def _hedge(self, ticket: _Ticket, now: int) -> None:
        late, waited, (first,) = self._latencies.late(ticket.kind), now - ticket.sent, ticket.copies
        if late is None or waited <= late:
            return
        able = [one.view(()) for one in self.replicas if one is not first.replica and not one.engine.queued]
        seats = sum(one.engine.limits.max_running for one in self.replicas)
        taken = sum(one.engine.queued + one.engine.running for one in self.replicas) / seats
        cost, stats = len(ticket.request.prompt), self.stats
        state = HedgeState(waited, late, cost, stats.hedged_tokens, stats.prompt_tokens, taken, bool(able))
        if self._hedging.step(state).send:
            stats.hedges += 1
            stats.hedged_tokens += cost
            self._send(ticket, _again(ticket.request), self.replicas[shortest(able).index], now)

    def _tie(self, ticket: _Ticket, replicas: Sequence[Replica], at: int) -> None:
        self.stats.tied += 1
        ticket.tied = replicas
        for replica in replicas:
            self._queues[replica.index].append(ticket)
            replica.expected += 1
        for replica in replicas:
            if ticket.tied and self._claimable(replica) is not None:
                self._send(ticket, ticket.request, replica, at)

    def _claimable(self, replica: Replica) -> _Ticket | None:
        """The first of those tied to a replica, taken out of both queues, where its next iteration could begin it."""
        engine, queue = replica.engine, self._queues[replica.index]
        limits = engine.limits
        if not queue or engine.queued_tokens >= limits.max_batch_tokens or engine.queued + engine.running >= limits.max_running:
            return None
        ticket = queue[0]
        for one in ticket.tied:
            self._queues[one.index].remove(ticket)
            one.expected -= 1
        ticket.tied = ()
        return ticket


def _again(request: Request) -> Request:
    """What was asked, to be served from the beginning."""
    return Request(
        request.id, request.prompt, request.sampling, arrival=request.arrival, priority=request.priority, deadline=request.deadline,
        cache_salt=request.cache_salt, session=request.session, adapter=request.adapter,
    )  # fmt: skip
