"""A picture of a trace: lanes over time with a bar a span, its colour the kind, and the counters below. As PNG, and as HTML to zoom in."""

from __future__ import annotations

import html
import itertools
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Final

from armillary.core.errors import MissingDependencyError
from armillary.core.trace import CounterSample, Span, Trace
from armillary.core.trace_bars import bars
from armillary.core.trace_columns import Number
from armillary.core.units import format_duration

COLOURS: Final = (
    "#4477aa", "#66ccee", "#228833", "#ee6677", "#ccbb44", "#aa3377", "#ee8833", "#44aa99", "#882255", "#999933", "#6655bb", "#777777",
)  # fmt: skip
"""Kinds take them in order of appearance; the first are Paul Tol's "bright" scheme, told apart by colour-blind readers."""
WAITING: Final = frozenset({"queued", "waiting", "wait", "idle", "preempted", "bubble", "stall"})
"""Kinds drawn grey: time that passes without work."""
_GREY: Final = "#c9c9c9"
_UNITS: Final = ((10**9, "s"), (10**6, "ms"), (10**3, "µs"), (1, "ns"))
_numbers = itertools.count(1)


def gantt_png(
    trace: Trace,
    path: str | Path,
    *,
    title: str | None = None,
    width: float = 14.0,
    max_lanes: int = 80,
    max_tracks: int = 4,
    dpi: int = 110,
) -> None:
    """Draw to `path` (PNG), `width` inches wide; what does not fit is counted in the title. Needs matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.collections import PolyCollection
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise MissingDependencyError("drawing a PNG needs matplotlib", "run `pip install matplotlib`") from error
    spans, lanes, note = _chosen(trace, max_lanes)
    kinds = list(dict.fromkeys(span.kind for span in spans))
    colour = dict(zip(kinds, kind_colours(kinds), strict=True))
    tracks = _tracks(trace.counters())
    start, end = _extent(spans, tracks)
    scale, unit = _unit(end - start)
    resolution = max(1, int((end - start) / (width * dpi)))
    row = {lane: i for i, lane in enumerate(lanes)}
    shown_tracks = list(tracks.items())[:max_tracks]
    lanes_inches = max(0.26 * len(lanes), 0.8)
    heights = [lanes_inches, *[1.1] * len(shown_tracks)]

    figure = Figure(figsize=(width, sum(heights) + 0.25 * len(heights) + 1.3), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights, squeeze=False)[:, 0]
    axis = axes[0]
    rectangles: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for bar in bars(spans, resolution):
        left, middle = (bar.start - start) / scale, row[bar.lane]
        # Never thinner than a pixel, and where there is room a pixel of gap, so that equal neighbours stay apart.
        gap = resolution if bar.end - bar.start > 5 * resolution else 0
        right = (max(bar.end - gap, bar.start + resolution) - start) / scale
        rectangles[bar.kind].append([(left, middle - 0.42), (right, middle - 0.42), (right, middle + 0.42), (left, middle + 0.42)])
    for kind, own in rectangles.items():
        axis.add_collection(PolyCollection(own, facecolors=colour[kind], linewidths=0))
    axis.set_xlim(0, max((end - start) / scale, 1e-9))
    axis.set_ylim(max(len(lanes), 1) - 0.5, -0.5)
    axis.set_yticks(range(len(lanes)), [_short(lane) for lane in lanes], fontsize=8, parse_math=False)
    axis.grid(axis="x", color="#e6e6e6", linewidth=0.6)
    axis.set_axisbelow(True)
    if kinds:
        patches = [Patch(color=colour[kind], label=_short(kind)) for kind in kinds[: len(COLOURS)]]
        if len(kinds) > len(COLOURS):
            patches.append(Patch(color="none", label=f"and {len(kinds) - len(COLOURS)} more kinds, colours repeat"))
        legend = axis.legend(
            handles=patches,
            loc="lower left",
            bbox_to_anchor=(0, 1),
            borderaxespad=0.1,
            ncols=8,
            fontsize=8,
            frameon=False,
            handlelength=1.2,
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
    for below, (track, series) in zip(axes[1:], shown_tracks, strict=True):
        for n, (name, (instants, values)) in enumerate(series.items()):
            line_colour = COLOURS[(n + 2) % len(COLOURS)]
            below.plot(
                [(at - start) / scale for at in instants],
                values,
                drawstyle="steps-post",
                linewidth=1.1,
                color=line_colour,
                label=_short(name),
            )
        below.set_ylabel(_short(track), fontsize=8, parse_math=False)
        below.tick_params(labelsize=7)
        below.grid(color="#e6e6e6", linewidth=0.6)
        below.set_ylim(bottom=min(0.0, below.get_ylim()[0]))
        if series:
            for text in below.legend(fontsize=7, frameon=False, loc="upper right", ncols=4).get_texts():
                text.set_parse_math(False)
    if len(tracks) > max_tracks:
        note = ", ".join(filter(None, (note, f"{len(tracks) - max_tracks} more counter tracks not drawn")))
    for side in axes:
        side.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"time [{unit}]", fontsize=9)
    figure.suptitle(_title(trace, title, spans, end - start, note), fontsize=11, x=0.01, ha="left", parse_math=False)
    figure.savefig(path, format="png")


def gantt_html(
    trace: Trace, *, title: str | None = None, max_lanes: int = 200, max_spans: int = 200_000, max_tracks: int = 6, standalone: bool = True
) -> str:
    """A page that needs nothing else, offline too; hovering a bar shows its reason and sizes, dragging zooms in, double click out.

    What is in view is drawn with at most a few thousand bars, short spans together, so that a trace of 200,000 spans stays fluid.
    With `standalone` False: a `<div>` with its script, for a page that includes `plotly_js()` and `gantt_js()` once. Needs plotly.
    """
    spans, lanes, note = _chosen(trace, max_lanes)
    if len(spans) > max_spans:
        note = ", ".join(filter(None, (note, f"the {len(spans) - max_spans:,} oldest spans not drawn")))
        spans = spans[-max_spans:]
        lanes = list(dict.fromkeys(span.lane for span in spans))
    tracks = _tracks(trace.counters())
    if len(tracks) > max_tracks:
        note = ", ".join(filter(None, (note, f"{len(tracks) - max_tracks} more counter tracks not drawn")))
    start, end = _extent(spans, tracks)
    heading = _title(trace, title, spans, end - start, note)
    lane, kind, reason, size = _Table(lanes), _Table(), _Table(), _Table()
    columns: dict[str, Any] = {
        "title": heading,
        "extent": end - start,
        "colours": COLOURS,
        "lane": [lane.code(span.lane) for span in spans],
        "kind": [kind.code(span.kind) for span in spans],
        "reason": [reason.code(span.reason) for span in spans],
        "size": [size.code(_sizes(span)) for span in spans],
        "start": [span.start - start for span in spans],
        "end": [span.end - start for span in spans],
        "lanes": lane.words,
        "kinds": kind.words,
        "kind_colours": kind_colours(kind.words),
        "reasons": reason.words,
        "sizes": size.words,
        "tracks": [
            {"name": track, "series": [_series(name, at, values, start) for name, (at, values) in series.items()]}
            for track, series in list(tracks.items())[:max_tracks]
        ],
    }
    # "<" cannot end the script from inside a JSON string when it is written as an escape.
    data = json.dumps(columns, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    name = f"armillary-gantt-{next(_numbers)}"
    part = f'<div id="{name}" class="armillary-gantt"></div>\n<script>armillaryGantt(document.getElementById("{name}"), {data});</script>\n'
    if not standalone:
        return part
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width">\n'
        f"<title>{html.escape(heading)}</title>\n<style>body {{ margin: 12px; font-family: system-ui, sans-serif; }}</style>\n"
        f"<script>{plotly_js()}</script>\n<script>{gantt_js()}</script>\n</head>\n<body>\n{part}</body>\n</html>\n"
    )


def kind_colours(kinds: Sequence[str]) -> list[str]:
    """A colour for each kind, in order; those of WAITING are grey."""
    working = itertools.cycle(COLOURS)
    return [_GREY if kind.lower() in WAITING else next(working) for kind in kinds]


def plotly_js() -> str:
    """The plotly.js that the plotly package carries (about 4.5 MB). Raises MissingDependencyError."""
    try:
        return (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(
            "drawing HTML needs the plotly package, which carries plotly.js", "run `pip install plotly`"
        ) from error


def gantt_js() -> str:
    """The script that draws: defines `armillaryGantt(element, columns)`."""
    return (resources.files("armillary.core") / "gantt.js").read_text(encoding="utf-8")


Series = tuple[list[int], list[Number]]
"""Instants (ns) and values."""


class _Table:
    """Words by number, in order of appearance."""

    def __init__(self, words: Sequence[str] = ()) -> None:
        self.words = list(words)
        self._codes = {word: i for i, word in enumerate(words)}

    def code(self, word: str) -> int:
        found = self._codes.setdefault(word, len(self.words))
        if found == len(self.words):
            self.words.append(word)
        return found


def _chosen(trace: Trace, max_lanes: int) -> tuple[list[Span], list[str], str]:
    """The spans of the first `max_lanes` lanes, those lanes, and a note about the rest."""
    spans = trace.spans()
    lanes = list(dict.fromkeys(span.lane for span in spans))
    note = ""
    if len(lanes) > max_lanes:
        note = f"{len(lanes) - max_lanes:,} more lanes not drawn"
        lanes = lanes[:max_lanes]
        kept = set(lanes)
        spans = [span for span in spans if span.lane in kept]
    return spans, lanes, note


def _tracks(samples: Sequence[CounterSample]) -> dict[str, dict[str, Series]]:
    """Values over time by track and name; what is not finite cannot be drawn."""
    tracks: dict[str, dict[str, Series]] = {}
    for track, at, values in samples:
        series = tracks.setdefault(track, {})
        for name, value in values.items():
            if abs(value) <= 1e300:
                instants, heights = series.setdefault(name, ([], []))
                instants.append(at)
                heights.append(value)
    return tracks


def _series(name: str, instants: list[int], values: list[Number], start: int, cells: int = 2000) -> dict[str, Any]:
    """A counter for the page: beyond a few thousand samples, the least and the greatest of each of `cells` stretches of time."""
    kept = range(len(instants))
    if len(instants) > 4 * cells:
        size = len(instants) / cells
        picked: set[int] = {0, len(instants) - 1}
        for cell in range(cells):
            stretch = range(int(cell * size), int((cell + 1) * size))
            picked.update((min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)))
        chosen: Sequence[int] = sorted(picked)
    else:
        chosen = kept
    return {"name": name, "at": [instants[i] - start for i in chosen], "values": [values[i] for i in chosen]}


def _extent(spans: Sequence[Span], tracks: dict[str, dict[str, Series]]) -> tuple[int, int]:
    instants = [at for series in tracks.values() for own, _ in series.values() for at in (own[0], own[-1])]
    start = min([*(span.start for span in spans), *instants], default=0)
    return start, max([*(span.end for span in spans), *instants], default=0)


def _unit(extent: int) -> tuple[int, str]:
    return next(((scale, name) for scale, name in _UNITS if extent >= 2 * scale), _UNITS[-1])


def _sizes(span: Span) -> str:
    return ", ".join(f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.6g}" for name, value in span.sizes.items())


def _title(trace: Trace, title: str | None, spans: Sequence[Span], extent: int, note: str) -> str:
    parts = [title or trace.name or "trace", f"{len(spans):,} spans in {format_duration(extent)}", note]
    if trace.dropped:
        parts.append(f"{trace.dropped:,} older ones were dropped while recording")
    return " · ".join(filter(None, parts))


def _short(text: str, limit: int = 36) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
