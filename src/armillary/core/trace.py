"""What happened: spans on lanes and counter samples, the same from every executor, real or virtual."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from armillary.core.errors import InputError
from armillary.core.trace_columns import SEGMENT, Columns, Number, Row

_INT64: Final = 2**63 - 1
_NOTHING: Final[Mapping[str, Number]] = MappingProxyType({})


class Span(NamedTuple):
    """Something of one `kind` that occupied `lane` from `start` to `end` (ns of the trace's clock), why, and how much of it."""

    lane: str
    kind: str
    start: int
    end: int
    reason: str = ""
    sizes: Mapping[str, Number] = _NOTHING

    @property
    def duration(self) -> int:
        """ns."""
        return self.end - self.start


class CounterSample(NamedTuple):
    """The values of a counter track at one instant (ns)."""

    track: str
    at: int
    values: Mapping[str, Number]


class Trace:
    """A bounded record of spans and counter samples.

    Times are integer ns of whichever clock the executor has; only differences mean anything. Appending costs well
    under a microsecond, takes no lock, and is safe from any thread. Past `capacity` spans (and, apart from them, as many
    counter samples) the oldest go, and `dropped` counts them. `meta` is JSON data that travels with the saved file.
    """

    def __init__(self, name: str = "", capacity: int = 1_000_000, meta: Mapping[str, Any] | None = None) -> None:
        if capacity < 1:
            raise InputError(f"a trace of capacity {capacity} can hold nothing", "give a capacity of at least 1 span", field="capacity")
        self.name = name
        self.capacity = capacity
        self.meta: dict[str, Any] = dict(meta or {})
        self._spans = Columns(capacity)
        self._counters = Columns(capacity)
        self._open_spans = self._spans.open
        self._lost = 0  # dropped before the file that this was loaded from was saved
        self._lost_counters = 0

    def add(self, lane: str, kind: str, start: int, end: int, reason: str = "", sizes: Mapping[str, Number] | None = None) -> None:
        """Record a span. `sizes` (tokens, bytes, ...) is copied. Raises InputError when it ends before it starts."""
        if start.__class__ is not int or end.__class__ is not int or not -_INT64 <= start <= end <= _INT64:
            start, end = _checked_interval(lane, kind, start, end)
        rows = self._open_spans
        if sizes:
            values = tuple(sizes.values())
            for value in values:
                if value.__class__ is not int and value.__class__ is not float:
                    values = _checked_values(kind, sizes)
                    break
            rows.append((lane, kind, start, end, reason, tuple(sizes), values))
        else:
            rows.append((lane, kind, start, end, reason, (), ()))
        if len(rows) >= SEGMENT:
            self._spans.flush()

    def count(self, track: str, at: int, values: Mapping[str, float]) -> None:
        """Record a sample of a counter track at instant `at` (ns), such as `{"used": 12, "free": 4}`."""
        at, _ = _checked_interval(track, "counter", at, at)
        self._counters.open.append((track, "", at, at, "", tuple(values), _checked_values(track, values)))
        if len(self._counters.open) >= SEGMENT:
            self._counters.flush()

    def extend(self, spans: Iterable[Span]) -> None:
        """Record spans made elsewhere."""
        for span in spans:
            self.add(*span)

    def spans(self) -> list[Span]:
        """The kept spans, in the order in which they were added."""
        return [_span(row) for row in self._spans.rows()]

    def tail(self, since: int) -> list[Span]:
        """Spans that end after `since` ns, in the order added; cheap to ask often, however long the trace is."""
        return [_span(row) for row in self._spans.tail(since)]

    def counters(self) -> list[CounterSample]:
        """The kept counter samples, in the order added."""
        return [_sample(row) for row in self._counters.rows()]

    def tail_counters(self, since: int) -> list[CounterSample]:
        """Counter samples later than `since` ns, in the order added."""
        return [_sample(row) for row in self._counters.tail(since)]

    def __len__(self) -> int:
        """How many spans are kept."""
        return min(self._spans.total, self.capacity)

    @property
    def dropped(self) -> int:
        """How many spans were lost to the bound."""
        return self._lost + max(0, self._spans.total - self.capacity)

    @property
    def dropped_counters(self) -> int:
        """How many counter samples were lost to the bound."""
        return self._lost_counters + max(0, self._counters.total - self.capacity)

    def save(self, path: str | Path) -> None:
        """Write Chrome/Perfetto JSON (open it at ui.perfetto.dev or chrome://tracing)."""
        from armillary.core.trace_perfetto import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Read what `save` wrote, exactly. Raises FormatError for anything that is not such a file."""
        from armillary.core.trace_perfetto import load

        return load(path)


def _span(row: Row) -> Span:
    lane, kind, start, end, reason, names, values = row
    return Span(lane, kind, start, end, reason, dict(zip(names, values, strict=True)))


def _sample(row: Row) -> CounterSample:
    return CounterSample(row[0], row[2], dict(zip(row[5], row[6], strict=True)))


def _checked_interval(lane: str, kind: str, start: Any, end: Any) -> tuple[int, int]:
    """Plain ints of what may be numpy integers."""
    try:
        start, end = start.__index__(), end.__index__()
    except AttributeError:
        raise InputError(f"span {kind!r} on {lane!r} has times {start!r} and {end!r}", "give integer nanoseconds") from None
    if end < start:
        raise InputError(f"span {kind!r} on {lane!r} ends at {end} ns, before its start at {start} ns", "swap them or fix the clock")
    if not -_INT64 <= start <= end <= _INT64:
        raise InputError(f"span {kind!r} on {lane!r} lies outside 64-bit nanoseconds", "use ns of one clock")
    return start, end


def _checked_values(what: str, sizes: Mapping[str, Any]) -> tuple[Number, ...]:
    """Plain ints and floats of what may be numpy or torch scalars."""
    values: list[Number] = []
    for name, value in sizes.items():
        if value.__class__ is int or value.__class__ is float:
            values.append(value)
        elif hasattr(value, "__index__"):
            values.append(int(value))
        elif hasattr(value, "__float__"):
            values.append(float(value))
        else:
            raise InputError(f"size {name!r} of {what!r} is {value!r}", "give an int or a float")
    return tuple(values)
