"""What is saved loads back exactly, opens in Perfetto, and what is damaged is refused by name."""

from __future__ import annotations

import contextlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.core.trace import Trace
from armillary.core.trace_perfetto import load

times = st.integers(-(2**62), 2**62 - 1)
numbers = st.integers(-(2**70), 2**70) | st.floats()
values = st.dictionaries(st.text(max_size=6), numbers, max_size=3)
texts = st.text(st.characters(), max_size=8)


def same(a: Any, b: Any) -> bool:
    """Equal with the types, and NaN equals itself."""
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@given(
    st.lists(st.tuples(texts, texts, times, times, texts, values), max_size=20),
    st.lists(st.tuples(texts, times, values), max_size=10),
    texts,
)
@example([("", "", -(2**62), 2**62 - 1, "", {})], [], "")  # the longest
def test_round_trip_is_exact(tmp_path_factory: pytest.TempPathFactory, spans: list[Any], samples: list[Any], name: str) -> None:
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    trace = Trace(name, capacity=50, meta={"model": "smollm2", "rate": 0.1, "tags": [1, None, {"a": 1e300}]})
    for lane, kind, a, b, reason, sizes in spans:
        trace.add(lane, kind, min(a, b), max(a, b), reason, sizes)
    for track, at, counted in samples:
        trace.count(track, at, counted)
    trace.save(path)
    loaded = Trace.load(path)
    assert same(loaded.spans(), trace.spans())
    assert same(loaded.counters(), trace.counters())
    assert (loaded.name, loaded.capacity, loaded.meta) == (trace.name, trace.capacity, trace.meta)


def test_what_was_dropped_stays_counted(tmp_path: Path) -> None:
    trace = Trace(capacity=3)
    for i in range(10):
        trace.add("a", "k", i, i + 1)
        trace.count("t", i, {"v": i})
    trace.save(tmp_path / "t.json")
    loaded = Trace.load(tmp_path / "t.json")
    assert (loaded.dropped, loaded.dropped_counters, len(loaded)) == (7, 7, 3)


def test_the_file_is_the_chrome_format(tmp_path: Path) -> None:
    trace = Trace("run")
    trace.add("engine", "step", 1_234_567_890_123, 1_234_567_891_124, "decode", {"tokens": 8})
    trace.count("kv_blocks", 1_000, {"used": 3})
    trace.save(tmp_path / "t.json")
    events = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    by_phase = {event["ph"]: event for event in events}
    assert by_phase["X"] == {
        "ph": "X", "name": "step", "pid": 1, "tid": 1, "ts": 1234567890.123, "dur": 1.001,
        "args": {"reason": "decode", "sizes": {"tokens": 8}},
    }  # fmt: skip
    assert by_phase["C"] == {"ph": "C", "name": "kv_blocks", "pid": 1, "ts": 1.0, "args": {"used": 3}}
    assert {"ph": "M", "name": "thread_name", "pid": 1, "tid": 1, "args": {"name": "engine"}} in events
    assert [entry.name for entry in tmp_path.iterdir()] == ["t.json"]  # no partial file is left


def test_traces_of_other_programs_load_when_they_keep_to_complete_events(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"ph":"X","name":"op","pid":7,"tid":"gpu","ts":1,"dur":2.5,"args":{}}]')
    (span,) = Trace.load(tmp_path / "t.json").spans()
    assert (span.lane, span.kind, span.start, span.end) == ("7/gpu", "op", 1000, 3500)


BAD = {
    "": "not JSON",
    "{": "not JSON",
    "nonsense": "not JSON",
    "3": "the document is 3",
    "{}": "traceEvents",
    '{"traceEvents":3}': "traceEvents",
    '{"traceEvents":[3]}': "event 0: it is 3",
    '{"traceEvents":[{"ph":"B"}]}': "event 0: its phase is 'B'",
    '{"traceEvents":[{"ph":["X"]}]}': "phase",
    '{"traceEvents":[{"ph":"M","name":"thread_name"}]}': "args is None",
    '{"traceEvents":[{"ph":"X","name":"k","ts":"1","dur":1}]}': "its ts is '1'",
    '{"traceEvents":[{"ph":"X","name":"k","ts":true,"dur":1}]}': "its ts is True",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1}]}': "its dur is None",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1,"dur":-1}]}': "lasts -1000 ns",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1e999999999,"dur":1}]}': "ts is out of bounds",
    '{"traceEvents":[{"ph":"X","name":"k","ts":9223372036854775,"dur":9223372036854775}]}': "within 64 bits",
    '{"traceEvents":[{"ph":"X","name":3,"ts":1,"dur":1}]}': "name is 3",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1,"dur":1,"args":{"sizes":{"n":"x"}}}]}': "sizes are numbers",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1,"dur":1,"args":{"sizes":[1]}}]}': "args.sizes",
    '{"traceEvents":[{"ph":"X","name":"k","ts":NaN,"dur":1}]}': "NaN is not JSON",
    '{"traceEvents":[],"otherData":{"armillary":{"version":99}}}': "version 99",
    '{"traceEvents":[],"otherData":{"armillary":{"capacity":-1}}}': "capacity",
    '{"traceEvents":[],"otherData":{"armillary":{"meta":[]}}}': "its meta",
    '{"traceEvents":[' + "1" * 5000 + "]}": "not JSON",
    '{"traceEvents":[{"ph":"X","name":"k","ts":1e99999999999999999999,"dur":1}]}': "not JSON",
    '{"traceEvents":[],"otherData":{"armillary":{"meta":{"a":' + "[" * 800 + "]" * 800 + "}}}}": "not JSON",
    "[" * 100_000: "not JSON",
}


@pytest.mark.parametrize("content", BAD, ids=range(len(BAD)))
def test_damage_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(FormatError) as caught:
        Trace.load(tmp_path / "t.json")
    assert BAD[content] in str(caught.value)
    assert "t.json" in str(caught.value)


@settings(max_examples=200)
@given(st.data())
def test_a_cut_or_altered_file_loads_or_is_refused_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.json"
    trace = Trace("fuzz", meta={"a": 1.5})
    trace.add("lane", "kind", 1, 2, "why", {"n": 3, "x": 0.5})
    trace.count("track", 5, {"v": 1})
    trace.save(path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    path.write_bytes(content)
    with contextlib.suppress(FormatError):
        Trace.load(path).spans()


def test_bounds_and_absence(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="cannot read"):
        Trace.load(tmp_path / "none.json")
    (tmp_path / "t.json").write_text('{"traceEvents":[]}')
    with pytest.raises(FormatError, match="the limit is 5 B"):
        load(tmp_path / "t.json", limit=5)
    with pytest.raises(InputError, match="meta"):
        Trace(meta={"x": object()}).save(tmp_path / "u.json")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["t.json"]


def test_links_and_what_is_no_file_are_written_through(tmp_path: Path) -> None:
    """Else a trace for a device's name would take the device's place."""
    trace, target, link, pipe = Trace("small"), tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    link.symlink_to(target)
    trace.save(link)
    assert link.is_symlink()
    assert Trace.load(target).name == "small"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        trace.save(pipe)
        assert os.read(reader, 1 << 16) == target.read_bytes()
    finally:
        os.close(reader)
    assert pipe.is_fifo()
