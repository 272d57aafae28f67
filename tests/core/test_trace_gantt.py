"""The pictures hold every span, keep to themselves, and survive hostile names."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armillary.core.trace import Trace
from armillary.core.trace_gantt import COLOURS, gantt_html, gantt_png, kind_colours, plotly_js

HOSTILE = "</script><img src=x onerror=alert(1)> $\\frac{$ _%s 雪"


def trace_of(spans: int, lanes: int = 4) -> Trace:
    """Lanes of back-to-back spans of 1 to 9 us and a counter."""
    trace = Trace("picture")
    ends = [10**15 + lane for lane in range(lanes)]
    for i in range(spans):
        lane, duration = i % lanes, 1000 + (i * 7919) % 8000
        trace.add(
            f"lane {lane}", ("prompt", "decode")[i // lanes % 7 > 2], ends[lane], ends[lane] + duration, f"reason {i % 5}", {"tokens": i}
        )
        ends[lane] += duration
        if lane == 0:
            trace.count("kv_blocks", ends[lane], {"used": i % 50, "lost": float("nan")})
    return trace


def columns(page: str) -> dict[str, Any]:
    match = re.search(r"armillaryGantt\(document\.getElementById\(\"[a-z0-9-]+\"\), (\{.*\})\);</script>", page)
    assert match
    return json.loads(match[1])


def pixels(path: Path) -> Any:
    from matplotlib.image import imread

    return np.asarray(imread(path))[..., :3]


def share(image: Any, colour: str) -> float:
    rgb = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return float((np.abs(image - rgb).max(axis=-1) < 0.02).mean())


def test_the_png_shows_each_kind_in_proportion_to_its_time(tmp_path: Path) -> None:
    trace = Trace()
    trace.add("a", "prompt", 0, 10**9)
    trace.add("a", "decode", 10**9, 4 * 10**9)
    gantt_png(trace, tmp_path / "a.png")
    image = pixels(tmp_path / "a.png")
    assert share(image, COLOURS[1]) / share(image, COLOURS[0]) == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize("make", [lambda: Trace(), lambda: trace_of(1), lambda: trace_of(50_000), lambda: trace_of(500, lanes=300)])
def test_any_trace_can_be_drawn(tmp_path: Path, make: Any) -> None:
    trace = make()
    gantt_png(trace, tmp_path / "t.png", width=8, dpi=60)
    image = pixels(tmp_path / "t.png")
    assert max(image.shape) < 3000
    assert (share(image, COLOURS[0]) + share(image, COLOURS[1]) > 0.02) == (len(trace) > 0)
    spans = trace.spans()
    extent = max(span.end for span in spans) - min(span.start for span in spans) if spans else 0
    assert columns(gantt_html(trace, max_lanes=1000))["extent"] == extent


def test_the_page_carries_every_span_exactly(tmp_path: Path) -> None:
    trace = trace_of(3000)
    found, spans = columns(gantt_html(trace)), trace.spans()
    assert [found["lanes"][i] for i in found["lane"]] == [span.lane for span in spans]
    assert [found["kinds"][i] for i in found["kind"]] == [span.kind for span in spans]
    assert [found["reasons"][i] for i in found["reason"]] == [span.reason for span in spans]
    assert [found["sizes"][i] for i in found["size"]] == [f"tokens {span.sizes['tokens']:,}" for span in spans]
    assert found["start"] == [span.start - 10**15 for span in spans]
    assert found["end"] == [span.end - 10**15 for span in spans]
    (track,) = found["tracks"]
    assert [series["name"] for series in track["series"]] == ["used"]  # what is never finite cannot be drawn
    assert track["series"][0]["values"] == [sample.values["used"] for sample in trace.counters()]


def test_a_long_counter_keeps_its_extremes() -> None:
    trace = Trace()
    for i in range(100_000):
        trace.count("t", i, {"v": 1000 if i == 54_321 else -5 if i == 77_777 else i % 7})
    values = columns(gantt_html(trace))["tracks"][0]["series"][0]["values"]
    assert (max(values), min(values)) == (1000, -5)
    assert len(values) < 10_000


def test_what_is_left_out_is_said() -> None:
    trace = trace_of(1000, lanes=10)
    found = columns(gantt_html(trace, max_lanes=4, max_spans=100))
    assert "6 more lanes not drawn" in found["title"]
    assert "300 oldest spans not drawn" in found["title"]
    assert len(found["start"]) == 100
    small = Trace(capacity=10)
    small.extend(trace.spans())
    assert "990 older ones were dropped" in columns(gantt_html(small))["title"]


def test_hostile_names_stay_names(tmp_path: Path) -> None:
    trace = Trace(HOSTILE)
    trace.add(HOSTILE, HOSTILE, 0, 10, HOSTILE, {HOSTILE: 1})
    trace.count(HOSTILE, 0, {HOSTILE: 1})
    page = gantt_html(trace)
    assert "<img" not in page.replace(plotly_js(), "")
    assert columns(page)["lanes"] == [HOSTILE]
    with pytest.warns(UserWarning, match="Glyph"):  # the font has no snow
        gantt_png(trace, tmp_path / "t.png")
    assert pixels(tmp_path / "t.png").size


def test_waiting_is_grey_and_takes_no_colour() -> None:
    assert kind_colours(["queued", "prompt", "idle", "decode"]) == ["#c9c9c9", COLOURS[0], "#c9c9c9", COLOURS[1]]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: run `pip install selenium`")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Chromium is not installed: run `apt install chromium chromium-driver`")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1300,900"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def wait_for(browser: Any, script: str) -> Any:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = browser.execute_script(script)
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never true in the page: {script}")


def test_in_a_browser_a_long_trace_is_few_bars_and_zooming_in_shows_each_span(browser: Any, tmp_path: Path) -> None:
    trace = trace_of(50_000)
    (tmp_path / "t.html").write_text(gantt_html(trace), encoding="utf-8")
    browser.get((tmp_path / "t.html").as_uri())
    element = "const e = document.querySelector('.armillary-gantt');"
    assert wait_for(browser, f"{element} return e.armillaryBars") <= 6000
    browser.execute_script(f"{element} Plotly.relayout(e, {{'xaxis.range[0]': 10, 'xaxis.range[1]': 10.1}})")  # ms
    inside = [span for span in trace.spans() if span.start - 10**15 <= 10_100_000 and span.end - 10**15 >= 10_000_000]
    texts = f"{element} const t = e.data.filter((d) => d.type === 'bar').flatMap((d) => d.hovertext);"
    hover = wait_for(browser, f"{texts} return t.length === {len(inside)} && t")
    for span in inside:
        assert any(
            f"<b>{span.kind}</b> on {span.lane}" in text and f"<br>{span.reason}<br>tokens {span.sizes['tokens']:,}" in text
            for text in hover
        )
    browser.execute_script(f"{element} Plotly.relayout(e, {{'xaxis.autorange': true}})")
    wait_for(browser, f"{element} return e.layout.xaxis.range[0] === 0 && e.data[0].hovertext.some((t) => t.includes('spans too short'))")


def test_in_a_browser_nothing_is_fetched_run_or_offered_for_upload(browser: Any, tmp_path: Path) -> None:
    trace = Trace(HOSTILE)
    trace.add(HOSTILE, HOSTILE, 0, 10, HOSTILE, {HOSTILE: 1})
    browser.get_log("performance")
    (tmp_path / "t.html").write_text(gantt_html(trace), encoding="utf-8")
    browser.get((tmp_path / "t.html").as_uri())
    wait_for(browser, "return document.querySelector('.armillary-gantt').armillaryBars")
    requests = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [r["params"]["request"]["url"] for r in requests if r["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []
    assert browser.execute_script("return document.images.length") == 0
    buttons = browser.execute_script("return [...document.querySelectorAll('.modebar-btn')].map((b) => b.dataset.title)")
    assert buttons
    assert not [title for title in buttons if "share" in title.lower() or "cloud" in title.lower()]
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
