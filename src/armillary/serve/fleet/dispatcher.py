"""Where each request runs, and what becomes of it when its replica is gone."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from armillary.core.clock import Clock
from armillary.core.errors import ArmillaryError, CapacityError, InputError
from armillary.serve.admission import admissible
from armillary.serve.config import EngineConfig
from armillary.serve.continuation import extend
from armillary.serve.fleet.config import FleetConfig, Role, go_together
from armillary.serve.fleet.followers import Followers, beside, hands_over
from armillary.serve.fleet.handover import Exchange, Handover
from armillary.serve.fleet.latencies import Latencies
from armillary.serve.fleet.member import Attempt, Link, Member, Stage, Ticket
from armillary.serve.fleet.messages import Message, pack_request, unpack_error, unpack_token
from armillary.serve.fleet.stories import Stories
from armillary.serve.fleet.watch import LOOK, Watch
from armillary.serve.policies import routing
from armillary.serve.policies.routing.hedging import Hedging
from armillary.serve.policies.routing.probation import Probation
from armillary.serve.policies.routing.state import RouteState, shortest
from armillary.serve.prefix_cache import known_names
from armillary.serve.request import Event, FinishReason, Request
from armillary.serve.schedule import Limits

MOST_DEATHS: Final = 3  # replicas that may die under a request before it is the request's fault

Announce = Callable[[Request, Event], None]


@dataclass(slots=True)
class FleetStats:
    """Cumulative counters since the fleet was made."""

    routed: int = 0
    hedges: int = 0
    hedges_won: int = 0  # by the second replica
    tied: int = 0
    moved: int = 0  # requests that a dead or silent replica had
    deaths: int = 0
    silences: int = 0
    convictions: int = 0  # of slow replicas
    prompt_tokens: int = 0  # sent for the first time
    hedged_tokens: int = 0


class Dispatcher:
    """Requests in, messages to replicas out, tokens back to `announce`. One caller at a time; never waits; in real or virtual time.

    A request's tokens come from one attempt only: the first that gives one. Whatever else was sent of it is cancelled then,
    and what a cancelled attempt still says is not heard. An attempt that is lost is made again elsewhere from the tokens so far,
    and because draws go by position the answer is the same.
    """

    def __init__(
        self,
        config: FleetConfig,
        engine: EngineConfig,
        limits: Limits,
        clock: Clock,
        announce: Announce,
        *,
        eos_ids: Collection[int] = (),
        probation: Probation | None = None,
        hedging: Hedging | None = None,
        look: int = LOOK,
        token_bytes: int = 0,
        exchange: Exchange | None = None,
    ) -> None:
        go_together(engine, config)
        self.config, self.engine, self.limits = config, engine, limits
        self.clock = clock
        self.members = [Member(i, role, limits.max_running, limits.total_blocks) for i, role in enumerate(config.roles)]
        self.router = routing.get(config.router)
        self.stats = FleetStats()
        self.finished: dict[FinishReason, int] = {"stop": 0, "length": 0, "cancelled": 0, "error": 0}
        self.generated = 0
        self.stories = Stories()
        self.tickets: dict[str, Ticket] = {}
        self._announce = announce
        self._eos = frozenset(eos_ids)
        self.latencies = Latencies()
        self._attempts: dict[int, Attempt] = {}
        self._numbers = itertools.count()
        self.unanswered: dict[str, Ticket] = {}
        self._homeless: deque[Ticket] = deque()  # there is no replica for them now
        self._followers = Followers()
        self._token_bytes = token_bytes
        self.handover = Handover(exchange)
        self.watch = Watch(self, probation or Probation(silence=round(config.silence * 1e9)), hedging or Hedging(config.hedge_budget), look)

    # -- requests ----------------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> int:
        """Requests of which no attempt has started."""
        return sum(member.waiting for member in self.members) + len(self._homeless) + len(self._followers)

    def submit(self, request: Request) -> None:
        """Raises as `Engine.submit`."""
        admissible(request, self.engine, self.limits)
        if request.id in self.tickets:
            raise InputError(f"a request '{request.id}' is already being served", "give each request its own id", field="id")
        if self.waiting >= self.engine.max_queue:
            raise CapacityError(
                f"the queue holds its bound of {self.engine.max_queue:,} requests", "retry later or serve with a larger --max-queue"
            )
        now = self.clock.now()
        pack_request(request, now)  # raises before it is one of ours
        if request.arrival is None:
            request.arrival = now
        ticket = Ticket(request, known_names(request, self.limits.block_size))
        parent = self.tickets.get(request.parent.id) if request.parent is not None else None
        if parent is not None and parent.request is request.parent:
            ticket.parent = parent
        self.tickets[request.id] = self.unanswered[request.id] = ticket
        self.stories.begin(request.id, request.arrival)
        self.stats.prompt_tokens += len(request.prompt)
        if self._homeless:
            self._homeless.append(ticket)
            ticket.homeless = True
            self.tell(ticket, f"{len(self._homeless) - 1} requests wait already that no replica can take now")
        else:
            self._place(ticket)

    def cancel(self, request_id: str) -> bool:
        """End a request wherever it is; False when it is unknown or has ended."""
        ticket = self.tickets.get(request_id)
        if ticket is None:
            return False
        self._end(ticket, "cancelled")
        return True

    def end_all(self) -> None:
        for ticket in list(self.tickets.values()):
            self._end(ticket, "cancelled")

    # -- where a request goes ----------------------------------------------------------------------------------------

    def _place(self, ticket: Ticket) -> bool:
        """Send it to a replica, or keep it until there is one; False when it is kept. Those that follow it are sent after it."""
        parent = self._followers.add(ticket)
        if parent is not None:
            self.tell(ticket, f"it shares its prompt with '{parent.request.id}', and goes where that is going to be")
            return True
        first = beside(ticket)
        if first is not None:
            ticket.homeless = False
            self.stats.routed += 1
            self.send(ticket, first.member, "prefill" if first.stage == "prefill" else "whole")
            self.tell(ticket, f"sent to replica {first.member.index}, where '{first.ticket.request.id}' has the prompt that they share")
            return True
        stage, candidates = self.candidates(ticket)
        if not candidates:
            if ticket not in self._homeless:
                self._homeless.append(ticket)
            if not ticket.homeless:
                ticket.homeless = True
                self.tell(ticket, "no replica can take it now: it waits")
            return False
        ticket.homeless = False
        if stage == "decode":  # the cache is there already: the least loaded, whatever the router
            view = shortest(self.state(ticket, candidates).replicas)
            chosen, why = self.members[view.index], f"it has the least to do: {view.waiting} waiting, {view.running} running"
        else:
            route = self.router.step(self.state(ticket, candidates))
            chosen, why = self.members[route.replica], route.reason
        self.stats.routed += 1
        others = [member for member in candidates if member is not chosen]
        tied = self.config.tail == "tied" and bool(others) and not ticket.request.output
        self.send(ticket, chosen, stage, tied)
        self.tell(ticket, f"sent to replica {chosen.index} ({_WORK[stage]}): {why}")
        if tied:
            second = shortest(self.state(ticket, others).replicas).index
            ticket.second = True
            self.stats.tied += 1
            self.send(ticket, self.members[second], stage, True)
            self.tell(ticket, f"also in the queue of replica {second}: the first of the two that could start it takes it")
        self._lead(ticket)
        return True

    def _lead(self, ticket: Ticket) -> None:
        """Those that waited to know where it goes on are sent after it."""
        for follower in self._followers.release(ticket):
            self._place(follower)

    def candidates(self, ticket: Ticket, exclude: Collection[Member] = ()) -> tuple[Stage, list[Member]]:
        """What is to be done next, and the replicas that may: open ones, slow ones only where no other is."""

        def able(role: Role) -> list[Member]:
            members = [member for member in self.members if member.role == role and member not in exclude]
            return [m for m in members if m.health == "open"] or [m for m in members if m.health == "slow"]

        if not self.config.prefill_workers:
            return "whole", able("both")
        if ticket.held is not None:
            return "decode", able("decode")
        prefill = able("prefill")
        if ticket.together or (not prefill and not exclude):
            return "whole", able("decode")  # slower, but an answer
        cost, room = ticket.request.known * self._token_bytes, self.config.transfer_memory
        return "prefill", [member for member in prefill if not member.held_bytes or member.held_bytes + cost <= room]

    def state(self, ticket: Ticket, candidates: Sequence[Member]) -> RouteState:
        views = tuple(member.view(ticket.names, self.limits.block_size) for member in candidates)
        request = ticket.request
        session = request.session or (ticket.names[0].hex() if ticket.names else request.id)
        return RouteState(request.id, session, request.known, views, self.stats.routed, self.engine.seed)

    def send(self, ticket: Ticket, member: Member, stage: Stage, tied: bool = False) -> None:
        request, now = ticket.request, self.clock.now()
        matched = member.prefixes.matched(ticket.names) * self.limits.block_size
        kind = Latencies.class_of(request.known - matched)
        attempt = Attempt(next(self._numbers), ticket, member, stage, now, kind, request.known, tied)
        message: Message = {"op": "submit", "attempt": attempt.number, "tied": tied, "request": pack_request(request, now)}
        if stage == "prefill":
            attempt.kv_bytes = request.known * self._token_bytes
            message["leave"] = self.handover.place(attempt) if hands_over(ticket) else None
            message["request"]["sampling"]["max_tokens"] = min(request.sampling.max_tokens, len(request.output) + 1)
        elif ticket.held is not None:
            message["fetch"] = {"place": ticket.held.place, "tokens": ticket.held.tokens, "bytes": ticket.held.size}
        if ticket.parent is not None:
            message["parent"] = next((one.number for one in ticket.parent.attempts if one.member is member), None)
        self._attempts[attempt.number] = attempt
        ticket.attempts.append(attempt)
        ticket.first_sent = ticket.first_sent if ticket.first_sent is not None else now
        member.add(attempt)
        member.prefixes.sent(ticket.names)
        assert member.link is not None
        member.link.send(message)

    def _withdraw(self, attempt: Attempt) -> None:
        """It is not wanted any more: nothing of it is heard from now on, and its memory is free as soon as the replica reads this."""
        self._forget(attempt)
        if attempt.member.link is not None:
            attempt.member.link.send({"op": "cancel", "attempt": attempt.number})

    def _forget(self, attempt: Attempt) -> None:
        del self._attempts[attempt.number]
        attempt.member.remove(attempt)
        attempt.ticket.attempts.remove(attempt)

    # -- what replicas say -------------------------------------------------------------------------------------------

    def joined(self, member: Member, link: Link) -> None:
        """A replica is ready."""
        member.link, member.health, member.heard = link, "open", self.clock.now()
        member.slowness, member.samples = 1.0, 0
        self.house()

    def heard(self, member: Member, message: Message) -> None:
        """A message of a replica that has joined."""
        member.heard = self.clock.now()
        if member.health == "silent":
            self.watch.convict(member)
            self.house()
        op = message["op"]
        if op == "pulse":
            member.pulse = message
            return
        attempt = self._attempts.get(message["attempt"])
        if attempt is None or attempt.member is not member:  # it was withdrawn meanwhile
            if message.get("left") is not None:
                self.handover.discard(message["attempt"], member)
        elif op == "fetched":
            self._fetched(attempt)
        elif op == "claim":
            self._claimed(attempt)
        elif op == "started":
            self._started(attempt, int(message["reused"]))
        elif op == "token":
            self._token(attempt, message)
        elif op == "refused":
            self._failed(attempt, unpack_error(message["error"]))

    def _claimed(self, attempt: Attempt) -> None:
        """A tied request could start there: it may, and only there."""
        for other in [other for other in attempt.ticket.attempts if other is not attempt]:
            self._withdraw(other)
        attempt.granted = True
        self.tell(attempt.ticket, f"replica {attempt.member.index} could start it first: taken out of every other queue")
        assert attempt.member.link is not None
        attempt.member.link.send({"op": "grant", "attempt": attempt.number})
        self._lead(attempt.ticket)

    def _started(self, attempt: Attempt, reused: int) -> None:
        request, now = attempt.ticket.request, self.clock.now()
        attempt.member.begin(attempt)
        if request.first_scheduled is None:
            request.first_scheduled, request.reused = now, reused
        shared = f", {reused} of its tokens from the prefix cache" if reused else ""
        self.tell(attempt.ticket, f"replica {attempt.member.index} started it{shared}")

    def _token(self, attempt: Attempt, message: Message) -> None:
        ticket, now = attempt.ticket, self.clock.now()
        request = ticket.request
        if message["reason"] == "error":
            self._failed(attempt, unpack_error(message["error"]))
            return
        if message["reason"] == "cancelled":  # not by us: the replica is stopping
            self._forget(attempt)
            self._drop_held(ticket)
            ticket.together = attempt.stage == "decode" and not attempt.fetched
            self._again(ticket, f"replica {attempt.member.index} gave it back")
            return
        if message["notes"] is not None:
            request.preemptions, request.drafted, request.accepted = message["notes"]
        if message["scores"]:
            request.prompt_logprobs[:] = [None if score is None else unpack_token(score) for score in message["scores"]]
        if request.id in self.unanswered:
            self._answered(attempt, now)
        if message["token"] is None:  # max_tokens 0: only the prompt was scored
            self._end(ticket, "length", Event(request.id, None, "", None, "length", now))
            return
        event = extend(request, unpack_token(message["token"]), self._eos, now)
        self.generated += 1
        if event.finish_reason is not None:
            if message["left"] is not None:
                self.handover.discard(attempt.number, attempt.member)
            self._end(ticket, event.finish_reason, event, ended=message["reason"] is not None)
            return
        self._announce(request, event)
        if attempt.stage == "prefill":
            self._handed_over(attempt, message)
        elif message["reason"] is not None:  # a replica of another mind about the end
            self._failed(attempt, ArmillaryError(f"replica {attempt.member.index} ended request '{request.id}' early"))

    def _answered(self, attempt: Attempt, now: int) -> None:
        """The first token: this attempt is the one, the others are cancelled and nothing of theirs is streamed."""
        ticket, member = attempt.ticket, attempt.member
        del self.unanswered[ticket.request.id]
        member.begin(attempt)
        assert ticket.first_sent is not None
        usual = self.latencies.usual(attempt.kind)
        losers = [other for other in ticket.attempts if other is not attempt]
        for other in losers:
            if usual and other.sent < attempt.sent:
                other.member.took((now - other.sent) / usual)
            self._withdraw(other)
        if losers:
            self.stats.hedges_won += attempt.sent > min(other.sent for other in losers)
            names = ", ".join(str(other.member.index) for other in losers)
            self.tell(ticket, f"replica {member.index} gave the first token: cancelled on replica {names}")
        if usual:
            member.took((now - attempt.sent) / usual)
        self.latencies.add(attempt.kind, now - ticket.first_sent)

    def _failed(self, attempt: Attempt, error: Exception) -> None:
        """An attempt ended with an error of its own: so does its request, unless another attempt goes on."""
        ticket = attempt.ticket
        if len(ticket.attempts) > 1:
            self.tell(ticket, f"replica {attempt.member.index} failed with it ({error}); the other goes on")
            self._forget(attempt)
            return
        if ticket.held is not None:
            self._forget(attempt)
            self._drop_held(ticket)
            ticket.together = True
            self._again(ticket, f"replica {attempt.member.index} could not fetch its keys and values ({error})")
            return
        self._end(ticket, "error", error=error, ended=True)

    # -- prefill here, decode there ----------------------------------------------------------------------------------

    def _handed_over(self, attempt: Attempt, message: Message) -> None:
        """The prompt is computed: its keys and values stay where they are until a decode worker has memory for them."""
        ticket = attempt.ticket
        self._forget(attempt)
        if message["left"] is not None:
            ticket.held = self.handover.hold(attempt, int(message["left"]["tokens"]), int(message["left"]["bytes"]))
        if ticket.held is not None:
            self.tell(ticket, f"replica {attempt.member.index} holds its keys and values, {ticket.held.size:,} bytes")
        self._place(ticket)

    def _fetched(self, attempt: Attempt) -> None:
        ticket = attempt.ticket
        attempt.fetched = True
        if ticket.held is not None:
            self.handover.fetched(ticket.held)
            ticket.held = None
            self.tell(ticket, f"replica {attempt.member.index} has fetched its keys and values")
            self.house()

    def _drop_held(self, ticket: Ticket) -> None:
        if ticket.held is not None:
            self.handover.release(ticket.held)
            ticket.held = None

    # -- what is lost and what waits ---------------------------------------------------------------------------------

    def tick(self) -> None:
        """What time alone brings about. Call it every few milliseconds while there are requests."""
        self.watch.tick()
        self.house()

    def lost(self, member: Member, why: str) -> None:
        """A replica's process is gone, and what it had computed."""
        member.health, member.link = "dead", None
        member.deaths += 1
        self.stats.deaths += 1
        member.prefixes.clear()
        holding = [ticket for ticket in self.tickets.values() if ticket.held is not None and ticket.held.member is member]
        if self.handover.died(member, {ticket.held.place for ticket in holding if ticket.held is not None}):
            for ticket in holding:  # who was to fetch it cannot, and gives the request back
                self._drop_held(ticket)
        for attempt in member.attempts.values():
            attempt.ticket.deaths += 1
        self.move(member, f"replica {member.index} died ({why})")

    def move(self, member: Member, why: str) -> None:
        """Its requests are given to others, from the tokens that have been streamed on."""
        for attempt in list(member.attempts.values()):
            ticket = attempt.ticket
            self._withdraw(attempt)
            if not ticket.attempts:
                self._again(ticket, why)

    def _again(self, ticket: Ticket, why: str) -> None:
        request = ticket.request
        if ticket.deaths >= MOST_DEATHS:
            error = ArmillaryError(f"{ticket.deaths} replicas died while they had request '{request.id}'", "see the replicas' logs")
            self._end(ticket, "error", error=error)
            return
        self.stats.moved += 1
        self.tell(ticket, f"{why}: to be continued elsewhere after {len(request.output)} tokens")
        self._place(ticket)

    def house(self) -> None:
        """There may be room for those that nobody could take: first come, first served."""
        while self._homeless:
            ticket = self._homeless.popleft()
            if not self._place(ticket):
                self._homeless.rotate(1)  # it was put last and was the first
                return

    # -- how requests end --------------------------------------------------------------------------------------------

    def _end(
        self, ticket: Ticket, reason: FinishReason, event: Event | None = None, *, error: Exception | None = None, ended: bool = False
    ) -> None:
        """The end, whatever the cause. `ended`: its only attempt has ended by itself."""
        request, now = ticket.request, self.clock.now()
        if reason in ("stop", "length") and len(ticket.attempts) == 1:  # whoever asks again with the answer in the prompt finds it there
            ticket.attempts[0].member.prefixes.sent(known_names(request, self.limits.block_size))
        for attempt in list(ticket.attempts):
            self._forget(attempt) if ended else self._withdraw(attempt)
        self._drop_held(ticket)
        request.block_names.clear()
        request.finish_reason, request.finished = reason, now
        del self.tickets[request.id]
        self.unanswered.pop(request.id, None)
        if ticket in self._homeless:
            self._homeless.remove(ticket)
        ticket.homeless = False
        self._followers.drop(ticket)
        self.finished[reason] += 1
        cause = f" ({error})" if error is not None else ""
        self.tell(ticket, f"ended: {reason}{cause}, {len(request.output)} tokens generated")
        self.stories.end(request.id)
        self._announce(request, event if event is not None else Event(request.id, None, "", None, reason, now, error))
        self._lead(ticket)
        self.house()

    def tell(self, ticket: Ticket, words: str) -> None:
        self.stories.tell(ticket.request.id, self.clock.now(), words)


_WORK: Final[dict[Stage, str]] = {"whole": "prompt and answer", "prefill": "the prompt", "decode": "the answer"}
