"""Keys and values between a prefill and a decode worker: what waits where, and that it is written whole, read once and removed."""

from __future__ import annotations

import contextlib
import secrets
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Protocol

from armillary.serve.fleet.member import Attempt, Member


class Exchange(Protocol):
    """How workers give each other keys and values. A `place` is a name that both understand."""

    def place(self, number: int, member: Member) -> str:
        """Where prefill attempt `number` on `member` leaves them."""
        ...

    def drop(self, place: str, member: Member) -> None:
        """Nobody will read them."""
        ...

    def died(self, member: Member, kept: set[str]) -> bool:
        """A prefill worker died; whether what it had left went with it. Otherwise only `kept` is still wanted."""
        ...


class SharedFolder:
    """Files in memory that all workers of this machine see: they outlive the worker that wrote them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def place(self, number: int, member: Member) -> str:
        return str(self._folder / f"{member.index}-{number}.kv")

    def drop(self, place: str, member: Member) -> None:
        _remove(Path(place))

    def died(self, member: Member, kept: set[str]) -> bool:
        for path in self._folder.glob(f"{member.index}-*"):
            if str(path) not in kept:
                _remove(path)
        return False


class Network:
    """Each prefill worker keeps them itself and sends them to whoever names the key, which nobody can guess."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def place(self, number: int, member: Member) -> str:
        key = blake2b(f"{member.index} {number}".encode(), key=self._secret, digest_size=16).hexdigest()
        return f"{member.address}/{key}"

    def drop(self, place: str, member: Member) -> None:
        if member.link is not None:
            member.link.send({"op": "free", "attempt": -1, "place": place})

    def died(self, member: Member, kept: set[str]) -> bool:
        return True


@dataclass(frozen=True, slots=True)
class Held:
    """What a prefill attempt left at `place`: the cache of the first `tokens` tokens of its request, `size` bytes."""

    member: Member
    place: str
    tokens: int
    size: int


class Handover:
    """The queue between prefill and decode is the prefill workers' memory: what nobody has fetched yet counts against its bound.

    A prefill worker says that they are there when they are, and a decode worker hears of them then: nothing is read before. It reads
    them when its pool has blocks for them. Whoever dies meanwhile, they are removed.
    """

    def __init__(self, exchange: Exchange | None) -> None:
        self._exchange = exchange
        self.transfers = 0
        self.bytes = 0

    def place(self, attempt: Attempt) -> str | None:
        """Where a prefill attempt shall leave its keys and values."""
        return None if self._exchange is None else self._exchange.place(attempt.number, attempt.member)

    def hold(self, attempt: Attempt, tokens: int, size: int) -> Held | None:
        place = self.place(attempt)
        if place is None:
            return None
        attempt.member.held_bytes += size
        return Held(attempt.member, place, tokens, size)

    def fetched(self, held: Held) -> None:
        self.transfers += 1
        self.bytes += held.size
        self.release(held)

    def release(self, held: Held) -> None:
        """Nobody needs it any more."""
        held.member.held_bytes -= held.size
        if self._exchange is not None:
            self._exchange.drop(held.place, held.member)

    def discard(self, attempt_number: int, member: Member) -> None:
        """An attempt that was withdrawn, or ended with its first token, has left something nevertheless."""
        if self._exchange is not None:
            self._exchange.drop(self._exchange.place(attempt_number, member), member)

    def died(self, member: Member, kept: set[str]) -> bool:
        """A worker died; whether what it held for others is lost."""
        return self._exchange is not None and self._exchange.died(member, kept)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
