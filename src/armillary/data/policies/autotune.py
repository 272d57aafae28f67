"""tf.data's autotuner (Murray et al., VLDB 2021): predict an input pipeline's speed from measured costs, and choose its numbers.

The model. Operators that one thread carries out one after another form a stage; `prefetch`, a parallel `map` and a parallel `interleave`
end one and begin the next. A stage that takes x ns an element and feeds, through a buffer of d elements, a consumer that takes y is an
M/M/1/k queue with k = d + 1 (d wait, one is in the consumer's hands). With r = y / x its consumer starves with probability
P0 = (1 - r) / (1 - r^(k + 1)), so an element takes

    T(x, y, d) = y / (1 - P0) = x (1 - r^(d + 2)) / (1 - r^(d + 1)),        x (d + 2) / (d + 1) where x = y:

x + y without a buffer, max(x, y) with an endless one, and the same whichever side is the slower. p workers that take c ns a call are a
stage of c / p ns. Stages fold from the source on; the training step is the last consumer. With constant times a pipeline takes as
long as its longest stage; what queueing adds grows with the square of the times' coefficient of variation (Kingman 1961), which is 1 for
the exponential times of the queue and about a half for work of the same kind: the prediction adds a quarter of the difference.

The search climbs: from the smallest numbers it takes the step that shortens the predicted time most (a number raised, or raised at the
cost of another), until no step within the limits gains `LEAST_GAIN`; then it takes back what gains less.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from armillary.core.errors import InputError
from armillary.data.pipeline import Batch, Filter, Interleave, Map, Operator, Pipeline, Prefetch

LEAST_GAIN: Final = 0.005  # of the predicted time
CONSUMER: Final = "consumer"
UNEVENNESS: Final = 0.5  # coefficient of variation of a stage's times


@dataclass(frozen=True, slots=True)
class Cost:
    """What one call of an operator costs, alone: ns, and bytes of what it gives. For the source a call is an element.

    `open` ns come once, before the first element; `keep` is a filter's share of kept elements; an interleave's `inner` iterables have
    that many elements on average, at `each` ns apiece after `open`.
    """

    each: float
    open: float = 0.0
    keep: float = 1.0
    inner: float = 1.0
    bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What tuning may use: threads (or processes) in all, elements in one buffer, bytes in all buffers."""

    threads: int = 16
    depth: int = 64
    bytes: float = math.inf


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the model's table: an operator's share in one output of the pipeline, in ns."""

    name: str
    kind: str
    calls: float  # a pipeline's output
    each: float  # ns a call
    workers: int
    work: float  # ns an output, divided by the workers
    buffer: int  # elements it may hold ready


@dataclass(frozen=True, slots=True)
class Prediction:
    """`time` ns an output, consumer included; the table; and who sets the pace."""

    time: float
    rows: tuple[Row, ...]
    bottleneck: str

    def table(self) -> list[tuple[str, ...]]:
        """Columns: operator, kind, calls an output, ms a call, workers, buffer, ms an output, share of the predicted time, note."""
        return [
            (
                row.name, row.kind, f"{row.calls:g}", f"{row.each / 1e6:.3f}", str(row.workers), str(row.buffer or "-"),
                f"{row.work / 1e6:.3f}", f"{row.work / self.time:.0%}" if self.time else "-", "bottleneck" if row.name == self.bottleneck else "",
            )
            for row in self.rows
        ]  # fmt: skip


COLUMNS: Final = ("operator", "kind", "calls/output", "ms/call", "workers", "buffer", "ms/output", "busy", "")


def queue_time(producer: float, consumer: float, depth: float) -> float:
    """T(x, y, d): ns an element of two stages with a buffer of `depth` elements (any real number >= 0) between them."""
    if producer <= 0 or consumer <= 0:
        return producer + consumer
    low, high = sorted((producer, consumer))  # it is symmetric; r <= 1 cannot overflow
    ratio = low / high
    if 1 - ratio < 1e-9:
        return high * (depth + 2) / (depth + 1)
    return high * (1 - math.pow(ratio, depth + 2)) / (1 - math.pow(ratio, depth + 1))


def predict(pipeline: Pipeline, costs: Mapping[str, Cost], consumer: float = 0.0, elements: int = 0) -> Prediction:
    """The model of a pipeline without AUTO. `consumer` is the training step's ns an output; `elements` of the source amortise its `open`."""
    if waiting := pipeline.automatic():
        raise InputError(f"operator {waiting[0]!r} has no number yet", "tune the pipeline first")
    names = [pipeline.source.name, *(operator.name for operator in pipeline.operators)]
    if missing := [name for name in names if name not in costs]:
        raise InputError(f"there is no measured cost of operator {missing[0]!r}", f"give one of each: {', '.join(names)}")
    calls = _calls(pipeline, costs)
    source = costs[pipeline.source.name]
    each = source.each + (source.open / elements if elements else 0.0)
    rows = [Row(pipeline.source.name, "source", calls[0], each, 1, calls[0] * each, 0)]
    # ns an output before the last boundary, of the stage after it, and the outputs that fit between them; the longest stage.
    made, stage, buffer, longest = None, calls[0] * each, 0.0, 0.0
    for operator, count in zip(pipeline.operators, calls[1:], strict=True):
        cost, workers, depth = costs[operator.name], _workers(operator), _depth(operator)
        each = cost.each + (cost.open / cost.inner if isinstance(operator, Interleave) else 0.0)
        rows.append(Row(operator.name, type(operator).__name__.lower(), count, each, workers, count * each / workers, depth))
        if not depth:
            stage += count * each
            continue
        made = stage if made is None else queue_time(made, stage, buffer)
        longest = max(longest, stage)
        if not isinstance(operator, Prefetch):
            longest = max(longest, count * each / workers)
            made = queue_time(made, count * each / workers, (depth - 1) / count)
        stage, buffer = 0.0, depth / count  # in outputs: a batch takes its elements at once
    rows.append(Row(CONSUMER, "consumer", 1, consumer, 1, consumer, 0))
    stage += consumer
    uneven = stage if made is None else queue_time(made, stage, buffer)
    even = max(longest, stage)
    time = even + UNEVENNESS**2 * (uneven - even)
    return Prediction(time, tuple(rows), max(rows, key=lambda row: row.work).name)


def autotune(
    pipeline: Pipeline, costs: Mapping[str, Cost], consumer: float = 0.0, limits: Limits | None = None, elements: int = 0
) -> dict[str, int]:
    """Numbers for every AUTO of the pipeline. Pure: the same costs give the same numbers."""
    limits = limits or Limits()
    operators = {operator.name: operator for operator in pipeline.operators}
    numbers = dict.fromkeys(pipeline.automatic(), 1)

    def time(chosen: Mapping[str, int]) -> float:
        return predict(pipeline.tuned(chosen), costs, consumer, elements).time

    def allowed(chosen: Mapping[str, int]) -> bool:
        tuned = pipeline.tuned(chosen)
        held = sum(_depth(operator) * costs[operator.name].bytes for operator in tuned.operators)
        deepest = max((operator.depth or 0 for operator in tuned.operators if isinstance(operator, Prefetch)), default=0)
        return threads(tuned) <= limits.threads and deepest <= limits.depth and held <= limits.bytes

    best = time(numbers)
    while steps := [(time(chosen), place, chosen) for place, chosen in enumerate(_neighbours(numbers, operators)) if allowed(chosen)]:
        found, _, chosen = min(steps)
        if best - found < LEAST_GAIN * best:
            break
        numbers, best = chosen, found
    # What a number gains less than is worth its threads and memory goes again.
    for name in numbers:
        while numbers[name] > 1 and time({**numbers, name: numbers[name] - 1}) - best < LEAST_GAIN * best:
            numbers = {**numbers, name: numbers[name] - 1}
    return numbers


def _neighbours(numbers: Mapping[str, int], operators: Mapping[str, Operator]) -> Iterator[dict[str, int]]:
    """One number raised by 1 or 2, alone or with another lowered: a worker may move, and a second worker may need its reader's thread."""
    for name, value in numbers.items():
        operator = operators[name]
        for more in (1, 2):
            if not isinstance(operator, Interleave) or value + more <= operator.cycle:
                raised = {**numbers, name: value + more}
                yield raised
                for other, have in numbers.items():
                    for less in (1, 2):
                        if other != name and have > less:
                            yield {**raised, other: have - less}


def threads(pipeline: Pipeline) -> int:
    """Threads that the pipeline's operators take in the background."""
    return sum(1 if isinstance(o, Prefetch) else _workers(o) for o in pipeline.operators if _depth(o))


def _workers(operator: Operator) -> int:
    if isinstance(operator, Interleave):
        return min(operator.parallelism or 1, operator.cycle)
    return (operator.parallelism or 1) if isinstance(operator, Map) else 1


def _depth(operator: Operator) -> int:
    """Elements that an operator may hold ready: 0 where it runs in its consumer's thread."""
    if isinstance(operator, Prefetch):
        return operator.depth or 1
    if isinstance(operator, Interleave) and operator.parallelism != 1:
        return operator.cycle * operator.block
    if isinstance(operator, Map) and operator.parallelism != 1:
        return operator.parallelism or 1
    return 0


def _calls(pipeline: Pipeline, costs: Mapping[str, Cost]) -> list[float]:
    """Calls of the source and of every operator for one output of the pipeline."""
    calls, need = [], 1.0
    for operator in reversed(pipeline.operators):
        if isinstance(operator, Filter):
            need /= max(costs[operator.name].keep, 1e-9)
            calls.append(need)
        elif isinstance(operator, Batch):
            calls.append(need)
            need *= operator.size
        else:
            calls.append(need)
            if isinstance(operator, Interleave):
                need /= max(costs[operator.name].inner, 1e-9)
    return [need, *reversed(calls)]
