"""What a reader sees of a run: the chart's dots, the lines, the JSON, the picture on a terminal."""

import io
import json
import math

import pytest

from armillary.train.chart import chart
from armillary.train.evaluate import Evaluation
from armillary.train.meter import Reading
from armillary.train.progress import JsonView, LiveView, PlainView, line


def reading(step=1, **changes):
    values = {
        "step": step, "steps": 100, "loss": 4.5, "gradient_norm": 0.75, "learning_rate": 3e-4, "tokens": 20_480, "tokens_per_second": 5120.0,
        "mfu": 0.52, "hfu": 0.52, "memory": 1_500_000_000, "seconds": 2.0, "seconds_left": 125.0, "waited": 0.001, "loss_scale": 1.0,
        "skipped": False,
    }  # fmt: skip
    return Reading(**{**values, **changes})


def dots(drawn):
    """(column, row) of every dot."""
    bits = {0x01: (0, 0), 0x02: (0, 1), 0x04: (0, 2), 0x40: (0, 3), 0x08: (1, 0), 0x10: (1, 1), 0x20: (1, 2), 0x80: (1, 3)}
    return {
        (2 * x + dx, 4 * y + dy)
        for y, text in enumerate(drawn)
        for x, cell in enumerate(text)
        for bit, (dx, dy) in bits.items()
        if (ord(cell) - 0x2800) & bit
    }


def test_a_falling_line_goes_from_corner_to_corner():
    drawn = chart([7 - i for i in range(8)], 4, 2)
    assert [len(text) for text in drawn] == [4, 4]
    assert dots(drawn) == {(i, i) for i in range(8)}


def test_a_run_that_has_just_begun_fills_its_share_of_the_width():
    assert max(x for x, _ in dots(chart([3.0, 2.0, 1.0], 50, 5, span=100))) == 2
    assert dots(chart([], 4, 2)) == set()
    assert dots(chart([1.0, float("nan"), 1.0], 2, 1)) == {(x, 0) for x in range(3)}


def test_a_line_says_everything_with_units():
    assert line(reading()) == (
        "step 1/100: loss 4.5000, gradient norm 0.750, learning rate 3.00e-04, tokens 20.5k, speed 5,120 tokens/s, MFU 52.0 %, "
        "memory 1.5 GB, 2 min 05 s left"
    )
    assert "HFU 69.3 %" in line(reading(hfu=0.693))
    assert "MFU" not in line(reading(mfu=None, hfu=None))
    assert "loss scale 512, skipped" in line(reading(loss_scale=512.0, skipped=True))
    assert "waits for data 12.0 %" in line(reading(waited=0.12))


def test_plain_lines_come_at_the_first_step_the_last_and_every_five_seconds():
    out, clock = io.StringIO(), iter([0.0, 1.0, 5.5, 6.0, 7.0, 8.0])
    view = PlainView(out, now=lambda: next(clock))
    for step in (1, 2, 3, 4, 5, 100):
        view.step(reading(step, skipped=step == 5))
    assert [text.split("/")[0] for text in out.getvalue().splitlines()] == ["step 1", "step 3", "step 5", "step 100"]


def test_json_is_an_object_a_line():
    out = io.StringIO()
    view = JsonView(out)
    view.step(reading(7))
    view.evaluation(7, Evaluation(2.0, 4096))
    first, second = map(json.loads, out.getvalue().splitlines())
    assert (first["event"], first["step"], first["mfu"], first["memory"]) == ("step", 7, 0.52, 1_500_000_000)
    assert second == {"event": "evaluation", "step": 7, "loss": 2.0, "perplexity": pytest.approx(7.389056), "tokens": 4096}


def test_a_step_that_overflowed_is_still_json():
    """NaN and Infinity are Python's: no other reader of JSON takes them."""
    out = io.StringIO()
    view = JsonView(out)
    view.step(reading(7, loss=math.inf, gradient_norm=math.nan, skipped=True))
    view.evaluation(7, Evaluation(1e4, 4096))
    first, second = (json.loads(line, parse_constant=lambda text: pytest.fail(text)) for line in out.getvalue().splitlines())
    assert (first["loss"], first["gradient_norm"], second["loss"], second["perplexity"]) == (None, None, 1e4, None)
    again = Reading.from_json(first)
    assert math.isnan(again.loss)
    assert (again.step, again.skipped, again.mfu) == (7, True, 0.52)


def test_the_picture_shows_the_numbers_at_every_width():
    from rich.console import Console

    for width in (60, 80, 120, 200):
        view = LiveView("pre-training", 100)
        view.close()
        view._console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
        view._console.print(view._picture())
        for step in range(1, 40):
            view.step(reading(step, loss=8 - step / 10))
        view.evaluation(20, Evaluation(6.25, 4096))
        view._console.print(view._picture())
        text = view._console.file.getvalue()
        assert "the first step is under way" in text
        for word in ("5,120 tokens/s", "52.0 %", "1.5 GB", "6.2500", "step 39 of 100"):
            assert word in text, (width, word)
        assert max(map(len, text.splitlines())) <= width
