"""`report.html` of a plan: candidates, the capacity curve, every option's arithmetic and what was not pursued, in one file that works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from armillary.core.trace_gantt import COLOURS
from armillary.plan.arithmetic import arithmetic
from armillary.plan.candidates import REASONS
from armillary.plan.disaggregation import Apart
from armillary.plan.file import Plan, sustained
from armillary.plan.objective import Objective
from armillary.plan.search import Found, Option
from armillary.web.planner_page import Page


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
    page = Page(title, lead)
    page.heading("The best")
    page.table(*_options(found))
    page.heading("Attainment against the rate of a replica, or a pair")
    page.plot(_curves(found, objective), _LAYOUT)
    for option in found.options:
        page.heading(option.name)
        page.lines(arithmetic(option, found.moments, found.rate))
    page.heading("Not pursued")
    page.table(
        ("candidate", "how many", "why", "numbers"), [(one.name, f"{one.count:,}", REASONS[one.reason], one.detail) for one in found.pruned]
    )
    page.write(path)


_LAYOUT: dict[str, Any] = {
    "xaxis": {"title": {"text": "requests a second a replica, or a pair"}, "rangemode": "tozero"},
    "yaxis": {"title": {"text": "share of requests that keep the objective"}, "range": [0, 1.03]},
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


def _options(found: Found) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
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
    return columns, [row(option) for option in found.options]
