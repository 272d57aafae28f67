"""`armillary reproduce`: published systems, ours beside the published figure."""

from __future__ import annotations

import html as markup
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.reproduce.registry import Experiment, Result, Row

_COLUMNS = ("quantity", "ours", "published", "ratio", "holds", "tolerance", "source")


def reproduce(
    name: Annotated[str | None, Parameter(help="What to run; without it, the list.")] = None,
    /,
    *,
    html: Annotated[Path | None, Parameter(help="Write the table and the picture to this file.")] = None,
    json: Json = False,
) -> int:
    """Run a published system's headline experiment and compare with its published figure.

    The exit status is 1 when a figure falls short.
    """
    from armillary.cli.main import FAILED
    from armillary.cli.terminal import print_json, table, timed
    from armillary.core.errors import InputError
    from armillary.reproduce import registry

    if name is None:
        if html is not None:
            raise InputError("--html is for one experiment", "name it: armillary reproduce NAME --html FILE")
        _list(json)
        return 0
    experiment = registry.get(name)
    if html is not None and not html.absolute().parent.is_dir():
        raise InputError(f"the folder {html.absolute().parent} does not exist", "make it, or choose another --html")
    with timed(f"{experiment.title}: about {experiment.takes}"):
        result = experiment.run()
    if html is not None:
        html.write_text(_page(experiment, result), encoding="utf-8")
    if json:
        print_json(
            {
                "name": experiment.name,
                "paper": experiment.paper,
                "claim": experiment.claim,
                "setup": experiment.setup,
                "holds": result.holds,
                "rows": [{field: getattr(row, field) for field in (*row.__dataclass_fields__, "ratio", "holds")} for row in result.rows],
            }
        )
    else:
        print(f"{experiment.title} ({experiment.paper}): {experiment.claim}\nsetup: {experiment.setup}\n")
        table(_COLUMNS, [_cells(row) for row in result.rows])
        if html is not None:
            print(f"\nwrote {html}")
    return 0 if result.holds else FAILED


def _list(json: bool) -> None:
    from armillary.cli.terminal import print_json, table
    from armillary.reproduce import registry

    known = [registry.get(name) for name in registry.names()]
    if json:
        print_json([{"name": e.name, "title": e.title, "paper": e.paper, "claim": e.claim, "takes": e.takes} for e in known])
        return
    table(("name", "system", "paper", "published claim", "takes"), [(e.name, e.title, e.paper, e.claim, e.takes) for e in known])


def _cells(row: Row) -> tuple[str, ...]:
    def amount(value: float) -> str:
        return f"{value:.4g} {row.unit}".strip() if row.unit != "x" else f"{value:.3g}x"

    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    tolerance = f"{row.tolerance} [set after]" if row.after else row.tolerance
    return row.quantity, amount(row.ours), amount(row.published), ratio, "yes" if row.holds else "NO", tolerance, row.source


def _page(experiment: Experiment, result: Result) -> str:
    """The table and the pictures as one self-contained page."""
    from armillary.core.trace_gantt import gantt_html, gantt_js, plotly_js

    def row(cells: Any, cell: str) -> str:
        return "<tr>" + "".join(f"<{cell}>{markup.escape(str(text))}</{cell}>" for text in cells) + "</tr>"

    head = row(_COLUMNS, "th")
    pictures = "\n".join(gantt_html(trace, title=title, standalone=False) for title, trace in result.pictures)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{markup.escape(experiment.title)}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 36px auto; padding: 0 24px; color: #1d2330; background: #fff; }}
h1 {{ font-size: 24px; margin: 0; }} p {{ color: #555d6b; max-width: 95ch; }}
table {{ border-collapse: collapse; margin: 18px 0; }} th, td {{ text-align: left; vertical-align: top; padding: 6px 16px 6px 0; border-bottom: 1px solid #e3e1d9; }}
</style>
<script>{plotly_js()}</script><script>{gantt_js()}</script></head>
<body><h1>{markup.escape(experiment.title)}</h1>
<p>{markup.escape(experiment.paper)}. {markup.escape(experiment.claim)}.<br>Setup: {markup.escape(experiment.setup)}.</p>
<table>{head}{"".join(row(_cells(one), "td") for one in result.rows)}</table>
{pictures}</body></html>
"""
