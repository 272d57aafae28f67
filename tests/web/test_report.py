"""The report of a run says what the trace says, and nothing that a client sent can run in it."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from armillary.core.trace import Trace
from armillary.core.units import MS
from armillary.serve.latency import RequestTiming
from armillary.web.report import KINDS, Metric, batches, write_report


def step(trace: Trace, start: int, end: int, entries: dict[str, tuple[str, int, str]]) -> None:
    trace.add("engine", "step", start, end, "", {"tokens": sum(count for _, count, _ in entries.values()), "sequences": len(entries)})
    trace.count("kv_blocks", end, {"used": len(entries)})
    for name, (kind, count, reason) in entries.items():
        trace.add(f"request/{name}", kind, start, end, reason, {"tokens": count})


def small_run() -> Trace:
    trace = Trace("test")
    step(trace, 10, 30, {"a": ("prompt", 5, "prompt")})
    trace.add("request/b", "queued", 12, 30, "token budget spent")
    step(trace, 30, 50, {"a": ("decode", 1, "decode"), "b": ("prompt", 3, "chunk of the prompt")})
    step(trace, 55, 60, {"b": ("decode", 1, "decode")})
    trace.add("request/a", "preempted", 50, 61, "no free KV blocks")
    step(trace, 61, 70, {"a": ("prompt", 7, "recompute")})
    return trace


def test_iterations_are_columns_and_requests_rows() -> None:
    picture = batches(small_run())
    assert picture.starts == (10, 30, 55, 61)
    assert picture.requests == ("a", "b")
    assert picture.states == ((2, 3, 4, 2), (1, 2, 3, 0))
    assert picture.tokens == ((5, 1, 0, 7), (0, 3, 1, 0))
    assert picture.reasons[0][2] == "no free KV blocks"


def test_of_a_long_run_the_last_iterations_are_kept_and_the_rest_counted() -> None:
    picture = batches(small_run(), columns=2)
    assert picture.starts == (55, 61)
    assert picture.left_out == 2
    assert picture.states == ((4, 2), (3, 0))


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 9)), max_size=3, unique_by=lambda entry: entry[0]), max_size=12))
def test_no_token_is_lost_or_drawn_twice(schedule: list[list[tuple[str, int]]]) -> None:
    trace = Trace()
    for index, entries in enumerate(schedule):
        kinds = {name: ("decode" if count == 1 else "prompt", count, "") for name, count in entries}
        step(trace, 10 * index, 10 * index + 10, kinds)
    picture = batches(trace)
    assert len(picture.starts) == len(schedule)
    for column, entries in enumerate(schedule):
        drawn = {name: row[column] for name, row in zip(picture.requests, picture.tokens, strict=True) if row[column]}
        assert drawn == dict(entries)


class _Page(HTMLParser):
    """Elements with their attributes, and the text of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self._in_script = True
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_script = self._in_script and tag != "script"

    def handle_data(self, data: str) -> None:
        if self._in_script:
            self.scripts[-1] += data


def written(folder: Path, name: str = "a") -> tuple[str, _Page, dict[str, Any]]:
    trace = Trace("test")
    step(trace, 0, 2 * MS, {name: ("prompt", 4, "prompt")})
    step(trace, 2 * MS, 3 * MS, {name: ("decode", 1, "decode")})
    timing = RequestTiming(name, 4, 0, 0, (2 * MS, 3 * MS), finish_reason="length")
    path = folder / "report.html"
    facts = {"model": name, "machine": "two cores"}
    write_report(trace, [Metric(name, "1.5 ms", name)], [timing], path, title=name, facts=facts, kv_blocks=8, config=f"policy = {name!r}")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    return text, page, json.loads(page.scripts[0])


def test_the_data_of_the_page_are_those_of_the_run(tmp_path: Path) -> None:
    _, _, data = written(tmp_path)
    assert data["kinds"] == list(KINDS)
    assert data["iterations"]["states"] == [[2, 3]]
    assert data["iterations"]["start"] == [0, 2]
    assert data["iterations"]["length"] == [2, 1]
    assert data["requests"] == [{"id": "a", "prompt": 4, "output": 2, "waited": 0, "first": 2, "gaps": [1]}]
    assert data["kv"] == {"at": [2, 3], "used": [1, 1], "total": 8}


def test_the_page_works_offline(tmp_path: Path) -> None:
    """No element fetches anything, and plotly.js stands in the page once."""
    text, page, _ = written(tmp_path)
    assert [attributes for _, attributes in page.elements if {"src", "href"} & set(attributes)] == []
    assert len(page.scripts) == 3
    assert len(re.findall(r"\* plotly\.js v", text)) == 1
    assert not re.search(r"@import|url\(", text.partition("</style>")[0])


def test_nothing_in_a_name_becomes_markup_or_script(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>%%PLOTLY%% %%DATA%%\u2028&amp;"
    text, page, data = written(tmp_path, evil)
    assert len(page.scripts) == 3
    assert "img" not in {tag for tag, _ in page.elements}
    assert data["requests"][0]["id"] == evil
    assert html.escape(evil) in text


def test_a_run_without_requests_is_a_report_too(tmp_path: Path) -> None:
    write_report(Trace(), [], [], tmp_path / "empty.html", title="nothing", facts={})
    data = json.loads(_Page((tmp_path / "empty.html").read_text(encoding="utf-8")).scripts[0])
    assert (data["iterations"]["states"], data["requests"], data["kv"]["total"]) == ([], [], None)
