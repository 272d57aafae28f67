"""One request's life in words: what happened when, and in short why it took as long as it did."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from armillary.core.units import format_duration
from armillary.serve.request import Request
from armillary.serve.schedule import Entry, Preemption, Reason

EVENTS = 64  # a story is cut in the middle: its beginning matters as much as its end
NEXT_ITERATION = "for the running iteration to end"
PREPARED = "until it reached the engine"
PREPARED_GRAMMAR = "until its grammar was compiled and it reached the engine"


@dataclass(slots=True)
class Story:
    """Written as things happen, at instants of the engine's clock in ns."""

    arrival: int
    waiting_since: int  # in the queue, first or after a preemption
    running: bool = False
    held: Reason | None = None  # what a schedule last said of it, while it could not run
    words: list[str] = field(default_factory=list)
    cut: int = 0
    queued: Counter[str] = field(default_factory=Counter)  # ns by reason, before it was first admitted
    returning: Counter[str] = field(default_factory=Counter)  # ns by reason, to come back after preemptions
    left_out: Counter[str] = field(default_factory=Counter)  # ns by reason, admitted but not in an iteration
    chunks: int = 0
    _reason: str = NEXT_ITERATION  # of the present wait
    _since: int | None = None  # when it began, if it waits
    _lost: int = 0  # tokens that the last preemption took

    def tell(self, at: int, words: str) -> None:
        """Add an event."""
        if len(self.words) == EVENTS:
            del self.words[EVENTS // 2]
            self.cut += 1
        self.words.append(f"+{format_duration(at - self.arrival)}: {words}")

    def arrived(self, request: Request, ahead: int, behind: Reason, at: int) -> None:
        """It enters the queue at `at`; what was done with it since its arrival is a wait too."""
        if at > self.arrival:
            self.queued[PREPARED if request.constraint is None else PREPARED_GRAMMAR] += at - self.arrival
        self._since = at
        self._reason = str(behind) if ahead else NEXT_ITERATION
        self.tell(at, f"arrived with a prompt of {len(request.prompt)} tokens, {ahead} requests ahead of it in the queue")

    def hold(self, reason: Reason, at: int) -> None:
        """A schedule names it among those that could not run."""
        if self.held is not reason:
            self._wait(reason, at)
            self.tell(at, f"held: {reason}")

    def preempted(self, request: Request, preemption: Preemption, at: int) -> None:
        """Before the request's state is reset."""
        self._stop_waiting(at)
        self.running, self.waiting_since, self._lost = False, at, request.computed
        self._wait(preemption.reason, at)
        self._reason = str(preemption.reason).removeprefix("preempted: ")
        self.tell(at, f"{preemption.reason}; gave back {preemption.blocks} KV blocks, up to {request.computed} tokens to compute again")

    def admitted(self, request: Request, entry: Entry, origin: str, at: int) -> None:
        """It enters the batch; `origin` is who had computed the first `entry.start` tokens."""
        self._stop_waiting(at)
        self.running, self.held = True, None
        self.chunks += entry.reason is Reason.CHUNK
        reused = f", {entry.start} of them from {origin}" if entry.start else ""
        kept = f"; of the {self._lost} that preemption took {min(entry.start, self._lost)} were still kept" if self._lost else ""
        self.tell(
            at, f"admitted: {entry.start + entry.count} of {request.known} tokens{reused} ({entry.reason}), {entry.blocks} KV blocks{kept}"
        )

    def goes_on(self, entry: Entry, at: int) -> None:
        """It is in an iteration again, after some that left it out or with the next piece of its prompt."""
        self._stop_waiting(at)
        self.held = None
        self.chunks += entry.reason is Reason.CHUNK
        if entry.reason is not Reason.DECODE:
            self.tell(at, f"{entry.reason}: tokens {entry.start} to {entry.start + entry.count}")

    def ended(self, request: Request, error: Exception | None, at: int) -> None:
        self._stop_waiting(at)
        cause = f" ({error})" if error is not None else ""
        drafts = f", {request.accepted} of {request.drafted} drafts right" if request.drafted else ""
        preemptions = f", {request.preemptions} preemptions"
        self.tell(at, f"ended: {request.finish_reason}{cause}, {len(request.output)} tokens generated{preemptions}{drafts}")
        self.words.append(f"in short: {self.short(request, at)}")

    def events(self) -> list[str]:
        """The words, in order, with what was left out."""
        half = EVENTS // 2
        gap = [f"({self.cut} events left out)"] if self.cut else []
        return [*self.words[:half], *gap, *self.words[half:]]

    def short(self, request: Request, at: int) -> str:
        """Where the time went and why, in one sentence."""
        begun, first = request.first_scheduled, request.first_token
        parts = [f"waited {format_duration((at if begun is None else begun) - self.arrival)} in the queue{_why(self.queued)}"]
        if begun is None:
            return f"{parts[0]} and never ran"
        reused = f", {request.reused} of {len(request.prompt)} tokens of it reused" if request.reused else ""
        chunked = f" in {self.chunks + 1} pieces, for the token budget ended in it" if self.chunks else ""
        parts.append(f"{format_duration((at if first is None else first) - begun)} from there to the first token{reused}{chunked}")
        if first is not None and request.last_token is not None and request.last_token > first:
            parts.append(f"{format_duration(request.last_token - first)} for {len(request.output) - 1} more")
        if request.preemptions:
            times = "once" if request.preemptions == 1 else f"{request.preemptions} times"
            parts.append(f"preempted {times}, back after {format_duration(self.returning.total())}{_why(self.returning)}")
        if self.left_out:
            parts.append(f"left out of iterations for {format_duration(self.left_out.total())}{_why(self.left_out)}")
        return "; ".join(parts)

    def _wait(self, reason: Reason, at: int) -> None:
        """It waits for this from now on."""
        self._stop_waiting(at)
        self.held, self._reason, self._since = reason, str(reason), at

    def _stop_waiting(self, at: int) -> None:
        if self._since is not None:
            kind = self.left_out if self.running else self.returning if self._lost else self.queued
            kind[self._reason] += at - self._since
            self._since = None


def _why(waits: Counter[str]) -> str:
    """The reasons of waits, the longest first; those under a hundredth of the whole go unsaid."""
    total = waits.total()
    named = [(reason, ns) for reason, ns in waits.most_common() if ns * 100 >= total > 0]
    if not named:
        return ""
    if len(named) == 1:
        return f" ({named[0][0]})"
    return f" ({', '.join(f'{format_duration(ns)} {reason}' for reason, ns in named)})"
