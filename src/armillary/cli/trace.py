"""`armillary trace`: look into a saved trace."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from armillary.cli.settings import Json

trace = App(name="trace")

TraceFile = Annotated[Path, Parameter(help="A trace.json that a run wrote.")]


@trace.command(name="show")
def show(file: TraceFile, /, *, json: Json = False) -> None:
    """How busy each lane was and how long each kind of span took."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.trace import Trace
    from armillary.core.trace_summary import summarise
    from armillary.core.units import format_duration as duration

    summary = summarise(Trace.load(file))
    if json:
        print_json(asdict(summary) | {"extent": summary.extent})
        return
    lost = f", {summary.dropped:,} dropped" if summary.dropped else ""
    print(f"{summary.name or file.name}: {summary.spans:,} spans on {len(summary.lanes)} lanes over {duration(summary.extent)}{lost}")
    table(
        ("lane", "spans", "busy", "share", "kinds"),
        [
            (lane.lane, f"{lane.spans:,}", duration(lane.busy), f"{lane.share:.1%}", ", ".join(f"{k.kind} {k.spans:,}" for k in lane.kinds))
            for lane in summary.lanes
        ],
    )
    table(
        ("kind", "spans", "p50", "p90", "p99", "longest", "total"),
        [(k.kind, f"{k.spans:,}", *(duration(value) for value in (k.p50, k.p90, k.p99, k.longest, k.total))) for k in summary.kinds],
    )


@trace.command(name="png")
def png(file: TraceFile, out: Path, /) -> None:
    """Draw the lanes over time as a picture."""
    from armillary.core.trace import Trace
    from armillary.core.trace_gantt import gantt_png

    gantt_png(Trace.load(file), out)
    print(f"wrote {out}")


@trace.command(name="html")
def html(file: TraceFile, out: Path, /) -> None:
    """Draw the lanes over time as one self-contained page to zoom in."""
    from armillary.core.trace import Trace
    from armillary.core.trace_gantt import gantt_html

    page = gantt_html(Trace.load(file))
    out.write_text(page, encoding="utf-8")
    print(f"wrote {out}")
