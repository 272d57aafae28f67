"""`report.html` of a run: every iteration's batch as a picture, memory, latencies, and the table, in one file that works offline."""

from __future__ import annotations

import html
import json
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from armillary.core.trace import Span, Trace
from armillary.core.trace_gantt import plotly_js
from armillary.core.units import MS, format_duration
from armillary.serve.latency import RequestTiming

KINDS: Final = ("queued", "prompt", "decode", "preempted")
"""What a request can be doing in an iteration; the codes of the picture are 1, 2, 3, 4, and 0 for nothing."""

MAX_COLUMNS: Final = 4000
"""Iterations that the picture shows; of a longer run, the last ones."""


@dataclass(frozen=True, slots=True)
class Metric:
    """A line of the table: what, how much with its unit, and what it means in a few words."""

    name: str
    value: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Batches:
    """Iterations as columns, requests as rows.

    `states[row][column]` is 0 or the place of its kind in KINDS + 1; `tokens` and `reasons` go with it.
    """

    starts: tuple[int, ...]  # ns
    ends: tuple[int, ...]
    requests: tuple[str, ...]
    states: tuple[tuple[int, ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    reasons: tuple[tuple[str, ...], ...]
    left_out: int = 0


def batches(trace: Trace, columns: int = MAX_COLUMNS) -> Batches:
    """The batch of every iteration (span `step` on lane `engine`), from the spans on the lanes `request/ID`.

    A request waits in the iterations that its span `queued` or `preempted` overlaps.
    """
    lanes: dict[str, list[Span]] = defaultdict(list)
    steps: list[Span] = []
    for span in trace.spans():
        if span.lane == "engine" and span.kind == "step":
            steps.append(span)
        elif span.lane.startswith("request/") and span.kind in KINDS:
            lanes[span.lane.removeprefix("request/")].append(span)
    left_out = max(0, len(steps) - columns)
    steps = steps[left_out:]
    starts = tuple(step.start for step in steps)
    ends = tuple(step.end for step in steps)
    names, states, tokens, reasons = [], [], [], []
    for name, spans in lanes.items():
        state, count, reason = [0] * len(steps), [0] * len(steps), [""] * len(steps)
        for span in sorted(spans, key=lambda span: span.kind in ("prompt", "decode")):  # work is painted over waiting
            column = bisect_left(ends, span.start + 1)
            while column < len(steps) and starts[column] < span.end:
                state[column], reason[column] = KINDS.index(span.kind) + 1, span.reason
                count[column] = int(span.sizes.get("tokens", 0))
                column += 1
        names.append(name)
        states.append(tuple(state))
        tokens.append(tuple(count))
        reasons.append(tuple(reason))
    return Batches(starts, ends, tuple(names), tuple(states), tuple(tokens), tuple(reasons), left_out)


def write_report(
    trace: Trace,
    metrics: Sequence[Metric],
    timings: Sequence[RequestTiming],
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    kv_blocks: int | None = None,
    config: str = "",
) -> None:
    """Write the report of a run of the engine.

    `facts` say what ran where (model, machine, ...), `kv_blocks` is the size of the KV pool, `config` the run's TOML.
    """
    picture = batches(trace)
    origin = min([*(timing.arrival for timing in timings), *picture.starts], default=0)
    data = {
        "title": title,
        "iterations": {
            "first": picture.left_out,
            "start": [_ms(start - origin) for start in picture.starts],
            "length": [_ms(end - start) for start, end in zip(picture.starts, picture.ends, strict=True)],
            "requests": picture.requests,
            "states": picture.states,
            "tokens": picture.tokens,
            "reasons": _coded(picture.reasons),
        },
        "kinds": KINDS,
        "kv": {
            "at": [_ms(sample.at - origin) for sample in trace.counters() if sample.track == "kv_blocks"],
            "used": [sample.values.get("used", 0) for sample in trace.counters() if sample.track == "kv_blocks"],
            "total": kv_blocks,
        },
        "requests": [
            {
                "id": timing.id,
                "prompt": timing.prompt_tokens,
                "output": len(timing.token_times),
                "waited": _ms((timing.first_scheduled or timing.arrival) - timing.arrival),
                "first": None if timing.time_to_first_token is None else _ms(timing.time_to_first_token),
                "gaps": [_ms(gap) for gap in timing.gaps],
            }
            for timing in timings
        ],
    }
    span = picture.ends[-1] - picture.starts[0] if picture.ends else 0
    fields = {
        "TITLE": html.escape(title),
        "STYLE": _resource("report.css"),
        "LEAD": html.escape(f"{len(timings)} requests, {len(picture.ends):,} iterations, {format_duration(span)}"),
        "FACTS": "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        "METRICS": "".join(
            f"<tr><td>{html.escape(m.name)}</td><td class=value>{html.escape(m.value)}</td><td>{html.escape(m.meaning)}</td></tr>"
            for m in metrics
        ),
        "CONFIG": html.escape(config),
        "DATA": script_json(data),
        "PLOTLY": plotly_js(),
    }
    # One pass, so that what is filled in is never searched for marks itself.
    page = re.sub(r"%%([A-Z]+)%%", lambda mark: fields[mark[1]], _resource("report.html"))
    Path(path).write_text(page, encoding="utf-8")


def _resource(name: str) -> str:
    return (files("armillary.web") / name).read_text(encoding="utf-8")


def _coded(reasons: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Reasons as indices into the few that there are."""
    names = sorted({reason for row in reasons for reason in row})
    place = {name: index for index, name in enumerate(names)}
    return {"names": names, "codes": [[place[reason] for reason in row] for row in reasons]}


def script_json(data: Any) -> str:
    """JSON that cannot end the script element that it stands in."""
    return json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _ms(ns: int) -> float:
    return round(ns / MS, 3)
