"""Keys and values on their way from a prefill to a decode worker: files in memory, written whole, read once, removed."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from armillary.serve.fleet.member import Attempt, Member


@dataclass(frozen=True, slots=True)
class Held:
    """What prefill attempt `number` left at `path`: the cache of the first `tokens` tokens of its request, `size` bytes."""

    number: int
    member: Member
    path: str
    tokens: int
    size: int


class Handover:
    """The queue between prefill and decode is the prefill workers' memory: what nobody has fetched yet counts against its bound.

    A prefill worker writes a file under another name and renames it, and says so afterwards, so that nothing is read before it is there; a
    decode worker opens it when it gets the request and reads it when its pool has blocks for it. Whoever dies meanwhile, files are removed here.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self.transfers = 0
        self.bytes = 0

    def path(self, attempt: Attempt) -> str | None:
        """Where a prefill attempt shall leave its keys and values; None where workers do not share memory."""
        return None if self._folder is None else str(self._folder / f"{attempt.member.index}-{attempt.number}.kv")

    def hold(self, attempt: Attempt, tokens: int, size: int) -> Held | None:
        path = self.path(attempt)
        if path is None:
            return None
        attempt.member.held_bytes += size
        return Held(attempt.number, attempt.member, path, tokens, size)

    def fetched(self, held: Held) -> None:
        self.transfers += 1
        self.bytes += held.size
        self.release(held)

    def release(self, held: Held) -> None:
        """Nobody needs it any more."""
        held.member.held_bytes -= held.size
        _remove(Path(held.path))

    def discard(self, attempt_number: int, member: Member) -> None:
        """An attempt that was withdrawn has finished nevertheless."""
        if self._folder is not None:
            _remove(self._folder / f"{member.index}-{attempt_number}.kv")

    def sweep(self, member: Member, kept: set[str]) -> None:
        """A prefill worker died: what it was writing, and what it had no time to tell of, is of no use."""
        if self._folder is not None:
            for path in self._folder.glob(f"{member.index}-*"):
                if str(path) not in kept:
                    _remove(path)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
