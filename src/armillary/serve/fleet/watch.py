"""Replicas that are slow or silent, and requests that are late: found by the clock, not by a message."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Final

from armillary.core.units import format_duration
from armillary.serve.fleet.member import Health, Member, Ticket
from armillary.serve.policies.routing.hedging import HedgeState, Hedging
from armillary.serve.policies.routing.probation import Probation, Pulse
from armillary.serve.policies.routing.state import shortest

if TYPE_CHECKING:
    from armillary.serve.fleet.dispatcher import Dispatcher

OLDEST: Final = 256  # requests without a token that are looked at for hedging
LOOK: Final = 5_000_000  # ns between two looks at them
GOOD: Final = 64  # requests in a row, none too slow, after which a replica's convictions are forgotten


class Watch:
    """Asks `probation` about each replica and `hedging` about each late request, and has the dispatcher do what they say."""

    def __init__(self, dispatcher: Dispatcher, probation: Probation, hedging: Hedging, look: int) -> None:
        self._dispatcher, self._probation, self.hedging, self._look = dispatcher, probation, hedging, look
        self._ticked = self._looked = dispatcher.clock.now()

    def tick(self) -> None:
        dispatcher = self._dispatcher
        now, before = dispatcher.clock.now(), self._ticked
        self._ticked = now
        if now - before < self._probation.silence // 2:  # otherwise it was this process that did not run
            for member in dispatcher.members:
                self._judge(member, now)
        if dispatcher.config.tail == "hedged" and now - self._looked >= self._look:
            self._looked = now
            for ticket in list(itertools.islice(dispatcher.unanswered.values(), OLDEST)):
                self._hedge(ticket, now)

    def convict(self, member: Member) -> None:
        """No new requests for a while, unless there is nobody else."""
        member.health = "slow"
        member.until = self._dispatcher.clock.now() + self._probation.term(member.convictions)
        member.convictions += 1
        self._dispatcher.stats.convictions += 1

    def _judge(self, member: Member, now: int) -> None:
        if member.health == "slow" and now >= member.until:
            member.health, member.slowness, member.samples = "open", 1.0, 0
        if member.health in ("open", "slow"):
            self._sentence(member, now)
        if member.health == "silent" and member.attempts and self._others(member, "open", "slow"):
            self._dispatcher.move(member, f"replica {member.index} has been silent for {format_duration(now - member.heard)}")

    def _sentence(self, member: Member, now: int) -> None:
        verdict = self._probation.step(Pulse(now - member.heard, member.slowness, member.samples))
        if verdict == "silent":
            member.health = "silent"
            self._dispatcher.stats.silences += 1
        elif verdict == "slow" and member.health == "open" and self._others(member, "open"):
            self.convict(member)
        elif member.samples >= GOOD:
            member.convictions = 0

    def _others(self, member: Member, *healths: Health) -> bool:
        """Whether somebody else could do its work: a decode worker can do a prefill worker's, not the reverse."""
        return any(
            other is not member and other.health in healths and member.role in (other.role, "prefill") for other in self._dispatcher.members
        )

    def _hedge(self, ticket: Ticket, now: int) -> None:
        if ticket.second or len(ticket.attempts) != 1:
            return
        dispatcher, (first,) = self._dispatcher, ticket.attempts
        late = dispatcher.latencies.late(first.kind)
        if late is None or now - first.sent <= late:
            return
        stage, able = dispatcher.candidates(ticket, (first.member,))
        able = [member for member in able if not member.waiting]
        members = [member for member in dispatcher.members if member.health == "open"]
        seats = sum(member.seats for member in members)
        decision = self.hedging.step(
            HedgeState(
                now - first.sent,
                late,
                ticket.request.known,
                dispatcher.stats.hedged_tokens,
                dispatcher.stats.prompt_tokens,
                sum(member.waiting + member.running for member in members) / seats if seats else 1.0,
                bool(able),
            )
        )
        if decision.send:
            second = shortest(dispatcher.state(ticket, able).replicas).index
            ticket.second = True
            dispatcher.stats.hedges += 1
            dispatcher.stats.hedged_tokens += ticket.request.known
            dispatcher.send(ticket, dispatcher.members[second], stage)
            dispatcher.tell(ticket, f"hedged: {decision.reason}; also sent to replica {second}, the first token wins")
        elif decision.late and not ticket.refused:
            ticket.refused = True
            dispatcher.tell(ticket, f"not hedged: {decision.reason}")
