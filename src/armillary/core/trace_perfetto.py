"""A trace as Chrome's JSON trace format, which Perfetto opens, and back without losing a nanosecond.

The format (Trace Event Format, "JSON Object Format"): lanes are threads of one process, spans are complete events
(`ph: "X"`) whose `ts` and `dur` are microseconds with three decimals, which is exactly the ns; counter samples are `ph: "C"`.
Reading parses those decimals as decimals, not as binary floats. A float that JSON cannot say is the string "NaN",
"Infinity" or "-Infinity".
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from decimal import Decimal
from json.encoder import encode_basestring_ascii as quoted
from pathlib import Path
from typing import Any, Final, NoReturn

from armillary.core.errors import FormatError, InputError, NotFoundError
from armillary.core.trace import CounterSample, Span, Trace
from armillary.core.trace_columns import Number
from armillary.core.units import format_bytes

MAX_FILE_BYTES: Final = 500_000_000
"""Three million spans. Reading takes about nine times the file in memory."""
VERSION: Final = 1
_PROCESS: Final = 1
_NOT_JSON: Final = {"nan": "NaN", "inf": "Infinity", "-inf": "-Infinity"}
_WORDS: Final = frozenset(_NOT_JSON.values())


def save(trace: Trace, path: str | Path) -> None:
    """Write `trace` to `path`, whole or not at all; what is no plain file (a pipe, a device) is written to as it is."""
    path = Path(path).resolve()
    if path.exists() and not path.is_file():
        with path.open("w", encoding="ascii", newline="\n") as stream:
            stream.writelines(to_json(trace))
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("w", encoding="ascii", newline="\n") as stream:
            stream.writelines(to_json(trace))
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(trace: Trace) -> Iterator[str]:
    """The file's text, in pieces."""
    spans = trace.spans()
    about = {
        "version": VERSION,
        "name": trace.name,
        "capacity": trace.capacity,
        "dropped": trace.dropped,
        "dropped_counters": trace.dropped_counters,
        "meta": trace.meta,
    }
    try:
        yield f'{{"displayTimeUnit":"ns","otherData":{{"armillary":{json.dumps(about, allow_nan=False)}}},"traceEvents":[\n'
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the meta of trace {trace.name!r} is not JSON ({error})", "keep to strings, finite numbers, lists and dicts"
        ) from error
    yield f'{{"ph":"M","name":"process_name","pid":{_PROCESS},"args":{{"name":{quoted(trace.name or "armillary")}}}}}'
    threads = {lane: number for number, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
    for lane, number in threads.items():
        where = f'"pid":{_PROCESS},"tid":{number}'
        yield f',\n{{"ph":"M","name":"thread_name",{where},"args":{{"name":{quoted(lane)}}}}}'
        yield f',\n{{"ph":"M","name":"thread_sort_index",{where},"args":{{"sort_index":{number}}}}}'
    for lane, kind, start, end, reason, sizes in spans:
        details = [f'"reason":{quoted(reason)}'] if reason else []
        if sizes:
            details.append(f'"sizes":{_numbers(sizes)}')
        yield (
            f',\n{{"ph":"X","name":{quoted(kind)},"pid":{_PROCESS},"tid":{threads[lane]},"ts":{_microseconds(start)},'
            f'"dur":{_microseconds(end - start)},"args":{{{",".join(details)}}}}}'
        )
    for track, at, values in trace.counters():
        yield f',\n{{"ph":"C","name":{quoted(track)},"pid":{_PROCESS},"ts":{_microseconds(at)},"args":{_numbers(values)}}}'
    yield "\n]}\n"


def load(path: str | Path, limit: int = MAX_FILE_BYTES) -> Trace:
    """Read a file of at most `limit` bytes. Raises NotFoundError or FormatError."""
    path = Path(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size > limit:
                raise FormatError(
                    f"the trace {path} has {format_bytes(size)}; the limit is {format_bytes(limit)}", "record a shorter trace"
                )
            content = stream.read(limit + 1)
    except OSError as error:
        raise NotFoundError(f"cannot read the trace {path} ({error.strerror})", "check the path") from error
    try:
        document = json.loads(content, parse_float=Decimal, parse_constant=_refuse_constant)
        return _Reader(str(path)).read(document)
    except FormatError:
        raise
    except (
        ValueError,
        ArithmeticError,
        RecursionError,
    ) as error:  # malformed JSON, invalid UTF-8, a number of too many digits, deep nesting
        raise FormatError(f"the trace {path} is not JSON ({error})", "save it again; was the copy cut short?") from error


class _Reader:
    """Checks everything it takes, and says which event of which file is wrong."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.where = ""

    def read(self, document: Any) -> Trace:
        if isinstance(document, list):  # the format's other form: a bare array of events
            document = {"traceEvents": document}
        events = self._of(dict, document, "the document").get("traceEvents")
        if not isinstance(events, list):
            self._wrong('it has no "traceEvents" list', "give a Chrome or Perfetto JSON trace, such as Trace.save writes")
        other = document.get("otherData", {})
        about = self._of(dict, other.get("armillary", {}) if isinstance(other, dict) else {}, "otherData.armillary")
        if about.get("version", VERSION) != VERSION:
            self._wrong(
                f"it is of version {about['version']!r}", f"read it with the release that wrote it; this one reads version {VERSION}"
            )
        capacity = max(self._count(about, "capacity", 1_000_000), 1)
        trace = Trace(
            self._of(str, about.get("name", ""), "its name"), capacity, self._plain(self._of(dict, about.get("meta", {}), "its meta"))
        )
        trace._lost, trace._lost_counters = self._count(about, "dropped", 0), self._count(about, "dropped_counters", 0)
        lanes = self._lanes(events)
        for i, event in enumerate(events):
            self.where = f"event {i}"
            phase = event["ph"]
            if phase == "X":
                trace.add(*self._span(event, lanes))
            elif phase == "C":
                trace.count(*self._sample(event))
        return trace

    def _lanes(self, events: list[Any]) -> dict[tuple[str, str], str]:
        """Thread names by (process, thread); checks the phases on the way."""
        lanes: dict[tuple[str, str], str] = {}
        for i, event in enumerate(events):
            self.where = f"event {i}"
            phase = self._of(dict, event, "it").get("ph")
            if phase == "M" and event.get("name") == "thread_name":
                args = self._of(dict, event.get("args"), "args")
                lanes[self._thread(event)] = self._of(str, args.get("name"), "the thread's name")
            elif phase not in ("M", "X", "C"):
                self._wrong(f"its phase is {phase!r}", 'only complete events ("X"), counters ("C") and metadata ("M") are read')
        self.where = ""
        return lanes

    def _span(self, event: dict[str, Any], lanes: Mapping[tuple[str, str], str]) -> Span:
        thread = self._thread(event)
        start, duration = self._nanoseconds(event, "ts"), self._nanoseconds(event, "dur")
        if duration < 0 or start + duration > 2**63 - 1:
            self._wrong(f"it lasts {duration} ns from {start} ns", "durations are at least 0 and times within 64 bits")
        args = self._of(dict, event.get("args", {}), "args")
        return Span(
            lanes[thread] if thread in lanes else "/".join(thread),
            self._of(str, event.get("name"), "name"),
            start,
            start + duration,
            self._of(str, args.get("reason", ""), "args.reason"),
            self._values(args.get("sizes", {}), "args.sizes"),
        )

    def _sample(self, event: dict[str, Any]) -> CounterSample:
        return CounterSample(
            self._of(str, event.get("name"), "name"), self._nanoseconds(event, "ts"), self._values(event.get("args", {}), "args")
        )

    def _thread(self, event: dict[str, Any]) -> tuple[str, str]:
        return str(event.get("pid", ""))[:100], str(event.get("tid", ""))[:100]

    def _nanoseconds(self, event: dict[str, Any], key: str) -> int:
        value: Any = event.get(key)
        if isinstance(value, bool) or not isinstance(value, int | Decimal):
            self._wrong(f"its {key} is {_shown(value)}", "give microseconds as a number")
        bound = Decimal(2**63 - 1) / 1000
        if not -bound <= value <= bound:  # before any arithmetic: a Decimal may have a billion digits to expand
            self._wrong(f"its {key} is out of bounds", "give microseconds within 64-bit nanoseconds")
        return value * 1000 if isinstance(value, int) else round(value * 1000)

    def _values(self, values: Any, what: str) -> dict[str, Number]:
        checked: dict[str, Number] = {}
        for name, value in self._of(dict, values, what).items():
            if isinstance(value, Decimal) or (isinstance(value, str) and value in _WORDS):
                checked[name] = float(value)
            elif isinstance(value, int) and not isinstance(value, bool):
                checked[name] = value
            else:
                self._wrong(f"{what}.{_shown(name)} is {_shown(value)}", "sizes are numbers")
        return checked

    def _count(self, about: dict[str, Any], key: str, default: int) -> int:
        value = about.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
            self._wrong(f"otherData.armillary.{key} is {_shown(value)}", "give a count")
        return value

    def _plain(self, value: Any) -> Any:
        """JSON data with the decimals as floats again."""
        if isinstance(value, Decimal):
            return float(value)
        if isinstance(value, dict):
            return {key: self._plain(item) for key, item in value.items()}
        return [self._plain(item) for item in value] if isinstance(value, list) else value

    def _of(self, kind: type, value: Any, what: str) -> Any:
        if not isinstance(value, kind):
            self._wrong(f"{what} is {_shown(value)}", f"a {'JSON object' if kind is dict else 'string'} belongs there")
        return value

    def _wrong(self, problem: str, fix: str) -> NoReturn:
        raise FormatError(f"trace {self.path}{', ' + self.where if self.where else ''}: {problem}", fix)


def _microseconds(ns: int) -> str:
    whole, part = divmod(abs(ns), 1000)
    return f"{'-' if ns < 0 else ''}{whole}.{part:03d}"


def _numbers(values: Mapping[str, Number]) -> str:
    return "{" + ",".join(f"{quoted(name)}:{_number(value)}" for name, value in values.items()) + "}"


def _number(value: Number) -> str:
    text = repr(value)
    return f'"{_NOT_JSON[text]}"' if text in _NOT_JSON else text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:60] + "..."


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
