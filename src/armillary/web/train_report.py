"""`report.html` of a training run: the loss, the learning rate, the speed, where the time of a step went; one file that works offline."""

from __future__ import annotations

import html
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from armillary.core.trace import Trace
from armillary.core.trace_gantt import plotly_js
from armillary.core.units import S
from armillary.train.meter import Reading
from armillary.web.report import Metric, script_json

MAX_POINTS: Final = 4000
"""Steps that the curves show; a longer run is thinned evenly, first and last kept."""

PHASES: Final = ("data", "forward", "backward", "gradient norm", "clip", "optimizer", "save", "evaluate")


def time_by_phase(trace: Trace, lane: str = "rank 0") -> dict[str, float]:
    """Seconds of the run that each phase took; `other` is what remains of the steps."""
    spent: dict[str, float] = defaultdict(float)
    for span in trace.spans():
        if span.lane == lane:
            spent[span.kind] += span.duration / S
    inside = sum(spent[kind] for kind in PHASES if kind not in ("save", "evaluate"))
    return {kind: spent[kind] for kind in PHASES if spent[kind] > 0} | {"other": max(0.0, spent["step"] - inside)}


def thinned(count: int, most: int = MAX_POINTS) -> list[int]:
    """Which of `count` steps are shown."""
    return list(range(count)) if count <= most else [round(index * (count - 1) / (most - 1)) for index in range(most)]


def write_train_report(
    readings: Sequence[Reading],
    evaluations: Sequence[tuple[int, float]],
    trace: Trace,
    metrics: Sequence[Metric],
    path: str | Path,
    *,
    title: str,
    lead: str,
    facts: Mapping[str, str],
    config: str = "",
    sample: str = "",
) -> None:
    """Write the report. `evaluations`: (steps made, loss on held-out text); `sample`: text that the trained model wrote."""
    shown = [readings[index] for index in thinned(len(readings))]
    data: dict[str, Any] = {
        "step": [r.step for r in shown],
        "loss": [_digits(r.loss) for r in shown],
        "norm": [_digits(r.gradient_norm) for r in shown],
        "lr": [_digits(r.learning_rate) for r in shown],
        "speed": [_digits(r.tokens_per_second) for r in shown],
        "mfu": [None if r.mfu is None else _digits(100 * r.mfu) for r in shown],
        "memory": [_digits(r.memory / 1e9) for r in shown],
        "skipped": [r.step for r in shown if r.skipped],
        "evaluations": [{"step": step, "loss": _digits(loss)} for step, loss in evaluations],
        "phases": time_by_phase(trace),
    }
    fields = {
        "TITLE": html.escape(title),
        "LEAD": html.escape(lead),
        "STYLE": _resource("report.css"),
        "FACTS": "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items()),
        "METRICS": "".join(
            f"<tr><td>{html.escape(m.name)}</td><td class=value>{html.escape(m.value)}</td><td>{html.escape(m.meaning)}</td></tr>"
            for m in metrics
        ),
        "SAMPLE": f"<section><h2>What it writes</h2><p>The first words of a held-out document, and how the trained model goes on.</p><pre class=sample>{html.escape(sample)}</pre></section>"
        if sample
        else "",
        "CONFIG": html.escape(config),
        "DATA": script_json(data),
        "PLOTLY": plotly_js(),
    }
    page = re.sub(r"%%([A-Z]+)%%", lambda mark: fields[mark[1]], _resource("train_report.html"))
    Path(path).write_text(page, encoding="utf-8")


def _resource(name: str) -> str:
    return (files("armillary.web") / name).read_text(encoding="utf-8")


def _digits(value: float) -> float | None:
    """Six significant digits; None for what JSON cannot say."""
    return float(f"{value:.6g}") if abs(value) < float("inf") else None
