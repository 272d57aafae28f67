"""`report.html` of a plan: candidates, the capacity curve, every option's arithmetic and what was not pursued, in one file that works offline."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from armillary.core.trace_gantt import COLOURS, plotly_js
from armillary.plan.arithmetic import arithmetic
from armillary.plan.candidates import REASONS
from armillary.plan.disaggregation import Apart
from armillary.plan.file import Plan, sustained
from armillary.plan.objective import Objective
from armillary.plan.search import Found, Option
from armillary.web.report import script_json

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 36px auto; padding: 0 24px; color: #1d2330; background: #fff; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 6px; } p, dd { color: #555d6b; max-width: 95ch; margin: 2px 0 8px; }
dt { font-weight: 600; } table { border-collapse: collapse; margin: 12px 0; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid #e3e1d9; }
"""


def write_plan_report(plan: Plan, found: Found, objective: Objective, path: str | Path) -> None:
    """Write the page. Needs plotly."""
    hardware, seen, apart = plan.hardware, plan.predicted, plan.disaggregation
    money = "" if seen.dollars_per_hour is None else f", ${seen.dollars_per_hour:,.2f} an hour"
    engines = f"{plan.replicas} x {hardware.devices} {hardware.device}"
    if apart is not None:
        prefill, decode = apart.prefill, apart.decode
        engines = f"{prefill.count} x {prefill.devices} {hardware.device} for prompts, {decode.count} x {decode.devices} for answers over {apart.link}"
    title = f"A plan for {plan.model}: {engines}"
    lead = (
        f"{plan.workload.rate:g} requests a second of {plan.workload.lengths}, {objective}: {seen.attainment:.1%} of {seen.requests:,} "
        f"simulated requests keep it{money}. Durations: {plan.provenance.cost_model}."
    )
    parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>", "<h2>The best</h2>", _options(found)]
    parts += ["<h2>Attainment against the rate of a replica, or a pair</h2>", '<div id="curve" style="height:420px"></div>']
    for option in found.options:
        lines = arithmetic(option, found.moments, found.rate)
        parts.append(f"<h2>{html.escape(option.name)}</h2><dl>")
        parts += [f"<dt>{html.escape(what)}</dt><dd>{html.escape(how)}</dd>" for what, how in lines]
        parts.append("</dl>")
    rows = [(one.name, f"{one.count:,}", REASONS[one.reason], one.detail) for one in found.pruned]
    parts += ["<h2>Not pursued</h2>", _table(("candidate", "how many", "why", "numbers"), rows)]
    figure = script_json({"data": _curves(found, objective), "layout": _LAYOUT})
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n<style>{_STYLE}</style>\n'
        f"<script>{plotly_js()}</script></head>\n<body>{''.join(parts)}\n"
        f'<script>const figure = {figure}; Plotly.newPlot("curve", figure.data, figure.layout, {{responsive: true}});</script></body></html>\n'
    )
    Path(path).write_text(page, encoding="utf-8")


_LAYOUT: dict[str, Any] = {
    "xaxis": {"title": {"text": "requests a second a replica, or a pair"}, "rangemode": "tozero"},
    "yaxis": {"title": {"text": "share of requests that keep the objective"}, "range": [0, 1.03]},
    "margin": {"t": 16, "r": 16},
    "hovermode": "closest",
}


def _curves(found: Found, objective: Objective) -> list[dict[str, Any]]:
    """A line an option through every rate that was tried; what does not hold is hollow."""
    lines: list[dict[str, Any]] = []
    for place, option in enumerate(found.options):
        probes = sorted(option.capacity.probes, key=lambda one: one.rate) if option.capacity is not None else []
        lines.append(
            {
                "name": option.name, "x": [one.rate for one in probes], "y": [one.attainment for one in probes],
                "mode": "lines+markers", "line": {"color": COLOURS[place % len(COLOURS)]},
                "marker": {"size": 9, "symbol": ["circle" if one.holds else "circle-open" for one in probes]},
                "text": [f"{one.requests:,} requests, waits grow by {one.growth:.2g} s/s" for one in probes],
            }
        )  # fmt: skip
    widest = max((rate for line in lines for rate in line["x"]), default=1.0)
    target = {
        "name": "objective",
        "x": [0, widest],
        "y": [objective.attainment] * 2,
        "mode": "lines",
        "line": {"color": "#777", "dash": "dot"},
    }
    return [*lines, target]


def _options(found: Found) -> str:
    def row(option: Option | Apart) -> tuple[str, ...]:
        counts = option.counts(found.rate)
        groups = option.groups(counts)
        hourly = (option.candidate if isinstance(option, Option) else option.prefill.candidate).rent.cost(*groups)
        return (
            option.name,
            f"{sustained(option, counts):.4g}",
            " + ".join(f"{count}" for count in counts),
            f"{sum(count * size for count, size in groups)}",
            "-" if hourly is None else f"{hourly:,.2f}",
        )

    columns = ("candidate", "requests a second a replica, or of all instances", "replicas, or prefill + decode", "devices", "$/hour")
    return _table(columns, [row(option) for option in found.options])


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    def line(cells: tuple[str, ...], cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in cells) + "</tr>"

    return f"<table>{line(columns, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"
