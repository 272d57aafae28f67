"""A replica and a request as the dispatcher knows them: what was sent, what runs, how healthy it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from armillary.serve.fleet.config import Role
from armillary.serve.fleet.messages import Message
from armillary.serve.fleet.prefix_index import PrefixIndex
from armillary.serve.policies.routing.state import ReplicaView
from armillary.serve.request import Request

if TYPE_CHECKING:
    from armillary.serve.fleet.handover import Held

Health = Literal["starting", "open", "slow", "silent", "dead"]
Stage = Literal["whole", "prefill", "decode"]
SMOOTHING = 0.3  # of a replica's slowness: the last handful of requests decide


class Link(Protocol):
    """The way to a replica. Neither waits nor raises: a replica that is gone is told of elsewhere."""

    def send(self, message: Message) -> None: ...


@dataclass(slots=True, eq=False)
class Attempt:
    """A request on a replica. `tied`: only one of its request's attempts may start, and `granted` says that it is this one."""

    number: int
    ticket: Ticket
    member: Member
    stage: Stage
    sent: int  # ns
    kind: int  # latency class
    tokens: int  # that its request knew when it was sent
    tied: bool = False
    granted: bool = False
    fetched: bool = False
    started: bool = False
    kv_bytes: int = 0  # that a prefill worker needs for it


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that has not ended. Attempts are those whose tokens count; once one has given a token it is the only one."""

    request: Request
    names: tuple[bytes, ...]  # of the prompt's full blocks
    parent: Ticket | None = None  # of the choice that computes the prompt they share
    attempts: list[Attempt] = field(default_factory=list)
    first_sent: int | None = None
    second: bool = False  # a hedge or a tie was sent
    refused: bool = False  # a hedge, which has been told
    homeless: bool = False  # no replica could take it, which has been told
    follows: bool = False  # it waits until it is known where its parent's prompt will be
    deaths: int = 0
    together: bool = False  # prompt and answer in one place, after a transfer that failed
    held: Held | None = None  # its cache, computed by a prefill worker and not fetched yet


class Member:
    """One replica: `index` for ever, the process behind it changes when it dies."""

    def __init__(self, index: int, role: Role, seats: int, blocks: int) -> None:
        self.index, self.role, self.seats = index, role, seats
        self.link: Link | None = None
        self.address = ""  # where it gives away keys and values
        self.health: Health = "starting"
        self.prefixes = PrefixIndex(blocks)
        self.attempts: dict[int, Attempt] = {}
        self.waiting = self.running = self.queued_tokens = self.held_bytes = 0
        self.heard = 0  # ns
        self.slowness, self.samples = 1.0, 0
        self.convictions, self.until = 0, 0
        self.deaths = 0
        self.pulse: Message = {}

    def view(self, names: tuple[bytes, ...], block_size: int) -> ReplicaView:
        return ReplicaView(
            self.index,
            self.waiting,
            self.running,
            self.queued_tokens,
            len(self.prefixes) * block_size,
            self.prefixes.matched(names) * block_size,
        )

    def add(self, attempt: Attempt) -> None:
        self.attempts[attempt.number] = attempt
        self.waiting += 1
        self.queued_tokens += attempt.tokens
        self.held_bytes += attempt.kv_bytes

    def begin(self, attempt: Attempt) -> None:
        """It runs from now on."""
        if not attempt.started:
            attempt.started = True
            self.waiting -= 1
            self.running += 1
            self.queued_tokens -= attempt.tokens

    def remove(self, attempt: Attempt) -> None:
        del self.attempts[attempt.number]
        self.held_bytes -= attempt.kv_bytes
        if attempt.started:
            self.running -= 1
        else:
            self.waiting -= 1
            self.queued_tokens -= attempt.tokens

    def took(self, times: float) -> None:
        """A request took `times` as long as is usual for its class."""
        self.samples += 1
        self.slowness += SMOOTHING * (times - self.slowness)
