"""`report.html` of a planner: its choice, tables, arithmetic and pictures, in one file that works offline."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from armillary.core.trace import Trace
from armillary.core.trace_gantt import gantt_html, gantt_js, plotly_js
from armillary.web.report import script_json

_STYLE: Final = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 36px auto; padding: 0 24px; color: #1d2330; background: #fff; }
h1 { font-size: 24px; margin: 0; } h2 { font-size: 18px; margin: 32px 0 6px; } p, dd { color: #555d6b; max-width: 95ch; margin: 2px 0 8px; }
dt { font-weight: 600; } table { border-collapse: collapse; margin: 12px 0; }
th, td { text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid #e3e1d9; }
"""


class Page:
    """Sections in the order in which they are added. Needs plotly."""

    def __init__(self, title: str, lead: str) -> None:
        self.title = title
        self._parts = [f"<h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p>"]
        self._figures: list[dict[str, Any]] = []

    def heading(self, text: str) -> None:
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        def line(cells: Sequence[str], cell: str) -> str:
            return "<tr>" + "".join(f"<{cell}>{html.escape(text)}</{cell}>" for text in cells) + "</tr>"

        self._parts.append(f"<table>{line(columns, 'th')}{''.join(line(row, 'td') for row in rows)}</table>")

    def lines(self, lines: Sequence[tuple[str, str]]) -> None:
        """(what, how): arithmetic."""
        body = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(how)}</dd>" for what, how in lines)
        self._parts.append(f"<dl>{body}</dl>")

    def plot(self, data: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> None:
        """A figure of plotly's."""
        self._parts.append(f'<div id="figure{len(self._figures)}" style="height:440px"></div>')
        self._figures.append({"data": list(data), "layout": {"margin": {"t": 16, "r": 16}, "hovermode": "closest", **layout}})

    def gantt(self, trace: Trace) -> None:
        self._parts.append(gantt_html(trace, standalone=False))

    def write(self, path: str | Path) -> None:
        draw = "figures.forEach((one, at) => Plotly.newPlot(`figure${at}`, one.data, one.layout, {responsive: true}));"
        page = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>\n<style>{_STYLE}</style>\n'
            f"<script>{plotly_js()}</script>\n<script>{gantt_js()}</script></head>\n<body>{''.join(self._parts)}\n"
            f"<script>const figures = {script_json(self._figures)}; {draw}</script></body></html>\n"
        )
        Path(path).write_text(page, encoding="utf-8")
