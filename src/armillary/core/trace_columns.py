"""How a trace keeps its rows: a list being written, then sealed segments of packed columns, the oldest dropped past a bound."""

from __future__ import annotations

import threading
from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Final, TypeAlias, TypeVar

T = TypeVar("T")
Number: TypeAlias = int | float
Row: TypeAlias = tuple[str, str, int, int, str, tuple[str, ...], tuple[Number, ...]]
"""lane, kind, start, end, reason, names of the sizes, their values."""

SEGMENT: Final = 1024


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows packed by column. Strings are codes into the segment's own tables, so dropping a segment frees its strings too:
    a server that runs for weeks has a new lane for every request and must not remember them all."""

    lanes: tuple[list[str], array[int]]
    kinds: tuple[list[str], array[int]]
    reasons: tuple[list[str], array[int]]
    names: tuple[list[tuple[str, ...]], array[int]]
    starts: array[int]
    ends: array[int]
    values: Sequence[Number]  # of all rows, one after the other
    offsets: array[int]  # row i owns values[offsets[i]:offsets[i + 1]]
    latest: int  # no row of this or an earlier segment ends after it

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> Row:
        return (
            self.lanes[0][self.lanes[1][i]],
            self.kinds[0][self.kinds[1][i]],
            self.starts[i],
            self.ends[i],
            self.reasons[0][self.reasons[1][i]],
            self.names[0][self.names[1][i]],
            tuple(self.values[self.offsets[i] : self.offsets[i + 1]]),
        )


def seal(rows: Sequence[Row], latest: int) -> Segment:
    """Pack 1 to 65,536 rows; `latest` is the latest end of all rows before them."""
    lanes, kinds, starts, ends, reasons, names, values = zip(*rows, strict=True)
    flat = list(chain.from_iterable(values))
    return Segment(
        lanes=_coded(lanes),
        kinds=_coded(kinds),
        reasons=_coded(reasons),
        names=_coded(names),
        starts=array("q", starts),
        ends=array("q", ends),
        values=_packed(flat),
        offsets=array("I", list(accumulate(map(len, values), initial=0))),
        latest=max(latest, max(ends)),
    )


def _coded(column: Sequence[T]) -> tuple[list[T], array[int]]:
    table = list(dict.fromkeys(column))
    if len(table) == 1:  # common, and a third of the cost
        return table, array("H", (0,)) * len(column)
    code = {entry: i for i, entry in enumerate(table)}
    return table, array("H", list(map(code.__getitem__, column)))


def _packed(values: list[Number]) -> Sequence[Number]:
    """8 bytes a value when all are int64 or all are floats; a mixture stays as objects, to come back with its types."""
    kinds = set(map(type, values))
    try:
        if kinds == {int}:
            return array("q", values)
        if kinds == {float}:
            return array("d", values)
    except OverflowError:  # an int over 64 bits
        pass
    return values


class Columns:
    """The last `capacity` rows appended, by any number of threads. Appending takes no lock; reading is a consistent snapshot.

    The writer's fast path is `columns.open.append(row)`, then `columns.flush()` once `open` holds SEGMENT rows.
    """

    def __init__(self, capacity: int) -> None:
        self.open: list[Row] = []
        self._capacity = capacity
        self._sealed: deque[Segment] = deque()
        self._kept = 0  # rows in self._sealed
        self._freed = 0  # rows of segments already dropped
        self._lock = threading.Lock()

    def flush(self) -> None:
        """Seal what is due. Concurrent appends go on behind the rows taken."""
        with self._lock:
            while len(self.open) >= SEGMENT:
                # Slice, then delete the same prefix: appends only touch the end, so none is lost or seen twice.
                segment = seal(self.open[:SEGMENT], self._sealed[-1].latest if self._sealed else -(2**63))
                del self.open[:SEGMENT]
                self._sealed.append(segment)
                self._kept += SEGMENT
                while self._kept - SEGMENT >= self._capacity:
                    self._sealed.popleft()
                    self._kept -= SEGMENT
                    self._freed += SEGMENT

    @property
    def total(self) -> int:
        """Rows ever appended."""
        with self._lock:
            return self._freed + self._kept + len(self.open)

    def rows(self) -> Iterator[Row]:
        """All kept rows, oldest first."""
        segments, first, rows = self._snapshot()
        for segment in segments:
            for i in range(first, len(segment)):
                yield segment.row(i)
            first = 0
        yield from rows

    def tail(self, since: int) -> list[Row]:
        """Kept rows that end after `since`, oldest first; costs as much as the rows appended since then, not as the whole."""
        segments, first, rows = self._snapshot()
        found = [row for row in reversed(rows) if row[3] > since]
        for segment in reversed(segments):
            if segment.latest <= since:  # nor does anything earlier end after it
                break
            ends, stop = segment.ends, first if segment is segments[0] else 0
            found.extend(segment.row(i) for i in range(len(ends) - 1, stop - 1, -1) if ends[i] > since)
        found.reverse()
        return found

    def _snapshot(self) -> tuple[list[Segment], int, list[Row]]:
        """Segments, the index of the first kept row in the first of them, and the open rows: together at most `capacity` rows."""
        with self._lock:
            segments, rows = list(self._sealed), list(self.open)
            beyond = max(0, self._kept + len(rows) - self._capacity)
        whole, first = divmod(beyond, SEGMENT)
        if whole >= len(segments):
            return [], 0, rows[beyond - len(segments) * SEGMENT :]
        return segments[whole:], first, rows
