"""Which bars to draw for a trace: one a span where there is room, and one for many where they would be narrower than the eye sees."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from armillary.core.errors import InputError
from armillary.core.trace import Span


@dataclass(frozen=True, slots=True)
class Bar:
    """`spans` spans of `lane` from `start` to `end` ns, most of whose time is of `kind`; `first` is one of them, the only one when alone."""

    lane: str
    kind: str
    start: int
    end: int
    spans: int
    first: Span


def bars(spans: Iterable[Span], resolution: int, limit: int | None = None) -> list[Bar]:
    """Bars in order of lane and start, at a `resolution` in ns; it is doubled until at most `limit` bars are left.

    A span at least as long as the resolution has its own bar. Shorter ones share cells of one resolution, a cell has the kind
    with the most time in it, and neighbouring cells of one kind are one bar. Instants that no span touches stay empty
    but for the rest of their cell.
    """
    if resolution < 1 or (limit is not None and limit < 1):
        raise InputError(f"cannot draw at a resolution of {resolution} ns with at most {limit} bars", "give at least 1 of each")
    lanes: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    for own in lanes.values():
        own.sort(key=lambda span: (span.start, span.end))
    origin = min((own[0].start for own in lanes.values()), default=0)
    while True:
        drawn = [bar for lane, own in lanes.items() for bar in _lane(lane, own, origin, resolution)]
        # A resolution above the whole extent leaves one cell, so a bar a lane, which is the least there can be.
        if limit is None or len(drawn) <= max(limit, len(lanes)):
            return drawn
        resolution *= 2


def _lane(lane: str, spans: list[Span], origin: int, resolution: int) -> list[Bar]:
    drawn = [Bar(lane, span.kind, span.start, span.end, 1, span) for span in spans if span.end - span.start >= resolution]
    cells: dict[int, list[Span]] = defaultdict(list)
    for span in spans:
        if span.end - span.start < resolution:
            cells[(span.start - origin) // resolution].append(span)
    previous: tuple[int, str] | None = None
    for cell, own in cells.items():  # in order of time, for the spans were
        kind = _main_kind(own)
        bar = Bar(lane, kind, own[0].start, max(span.end for span in own), len(own), own[0])
        if previous == (cell - 1, kind):
            before = drawn.pop()
            bar = Bar(lane, kind, before.start, max(before.end, bar.end), before.spans + bar.spans, before.first)
        drawn.append(bar)
        previous = cell, kind
    drawn.sort(key=lambda bar: bar.start)
    return drawn


def _main_kind(spans: list[Span]) -> str:
    if len(spans) == 1:
        return spans[0].kind
    time: dict[str, int] = defaultdict(int)
    for span in spans:
        time[span.kind] += span.end - span.start
    return max(time, key=lambda kind: time[kind])
