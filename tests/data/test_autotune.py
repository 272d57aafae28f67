"""tf.data's model and tuner: closed forms, the guide's numbers in virtual time, and never far from the best of the grid."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.data.executors.virtual import VirtualExecutor
from armillary.data.pipeline import AUTO, Pipeline
from armillary.data.policies.autotune import Cost, Limits, autotune, predict, queue_time, threads

MS = 1e6
# "Better performance with the tf.data API": ArtificialDataset opens in 30 ms and reads a sample in 15, a training step takes 10,
# two epochs of three samples; its map takes 30 ms.
GUIDE = {"source": Cost(each=15 * MS, open=30 * MS), "map": Cost(each=30 * MS), "prefetch": Cost(each=0)}
SOURCE = Pipeline.of(lambda: range(3))

times = st.floats(0.01, 100)


def seconds(pipeline: Pipeline, epochs: int = 2, elements: int = 3, costs: dict[str, Cost] = GUIDE) -> float:
    return VirtualExecutor(costs, elements, 10 * MS).run(pipeline, epochs).time / 1e9


def test_the_guides_numbers() -> None:
    assert seconds(SOURCE) == 0.210  # 2 (30 + 3 (15 + 10))
    assert seconds(SOURCE.prefetch(1)) == 0.170  # 2 (30 + 3 x 15 + 10)
    assert seconds(SOURCE.map(abs)) == 0.390  # 2 (30 + 3 (15 + 30 + 10))
    assert seconds(SOURCE.map(abs).prefetch(1)) == 0.350  # 2 (30 + 3 (15 + 30) + 10)
    # Each further step of the guide is faster than the one before, until reading is all that is left: 2 (30 + 3 x 15 + 30 + 10).
    steps = [SOURCE.map(abs), SOURCE.map(abs).prefetch(1), *(SOURCE.map(abs, parallelism=workers).prefetch(1) for workers in (2, 3))]
    assert [seconds(step) for step in steps] == [0.390, 0.350, 0.230, 0.230]


def test_the_guides_parallel_extraction() -> None:
    costs = {"source": Cost(each=0), "interleave": Cost(each=15 * MS, open=30 * MS, inner=3), "prefetch": Cost(each=0)}
    files = Pipeline.of(lambda: range(2))
    naive = seconds(files.interleave(spread_never_called, cycle=2), 1, 2, costs)
    parallel = seconds(files.interleave(spread_never_called, cycle=2, parallelism=2), 1, 2, costs)
    assert naive == pytest.approx(0.210)  # two files, each opened, and six samples read and trained on
    # Both files at once: the first sample after 45 ms; from then on two arrive every 15 ms, and six steps never wait.
    assert parallel == pytest.approx(0.045 + 6 * 0.010)


def spread_never_called(value: int) -> list[int]:
    raise AssertionError("virtual time calls no function")


@given(x=times, y=times, depth=st.integers(0, 50))
def test_the_queues_time_lies_between_its_limits(x: float, y: float, depth: int) -> None:
    time = queue_time(x, y, depth)
    assert time == pytest.approx(queue_time(y, x, depth), rel=1e-9)  # whichever side is slower
    assert max(x, y) * (1 - 1e-9) <= time <= (x + y) * (1 + 1e-9)
    assert queue_time(x, y, depth + 1) <= time * (1 + 1e-9)
    assert queue_time(x, y, 0) == pytest.approx(x + y)
    assert queue_time(x, x, depth) == pytest.approx(x * (depth + 2) / (depth + 1))


@pytest.mark.parametrize(("x", "y", "depth"), [(1.0, 1.0, 1), (1.0, 2.0, 3), (3.0, 2.0, 2), (1.0, 0.7, 6)])
def test_the_queues_time_is_that_of_exponential_stages(x: float, y: float, depth: int) -> None:
    draw = random.Random(1)
    made, taken = 0.0, [0.0] * depth  # when each element was taken, with `depth` places free at the start
    free, count = 0.0, 200_000
    for number in range(count):
        made = max(made, taken[number]) + draw.expovariate(1 / x)
        taken.append(max(made, free))
        free = taken[-1] + draw.expovariate(1 / y)
    assert free / count == pytest.approx(queue_time(x, y, depth), rel=0.02)


@pytest.mark.parametrize("seed", range(24))
def test_tuned_is_within_5_percent_of_the_best_of_the_grid(seed: int) -> None:
    draw = random.Random(seed)
    names = ("source", "map", "map 2", "consumer")
    costs = {name: Cost(draw.choice([0.3, 1, 4, 10, 30, 60]) * draw.uniform(0.7, 1.4) * MS) for name in names}
    costs |= {"filter": Cost(0, keep=draw.choice([1.0, 0.5])), "batch": Cost(0.1 * MS), "prefetch": Cost(0)}
    consumer = costs["consumer"].each
    pipeline = (
        Pipeline.of(lambda: []).map(abs, parallelism=AUTO).filter(bool).map(abs, parallelism=AUTO).batch(draw.choice([1, 4])).prefetch(AUTO)
    )
    limits = Limits(threads=8, depth=4)
    executor = VirtualExecutor(costs, 96, consumer)
    grid = [dict(zip(pipeline.automatic(), numbers, strict=True)) for numbers in itertools.product(range(1, 7), range(1, 7), (1, 2, 4))]
    allowed = [numbers for numbers in grid if threads(pipeline.tuned(numbers)) <= limits.threads]
    best = min(executor.run(pipeline.tuned(numbers)).time for numbers in allowed)
    chosen = autotune(pipeline, costs, consumer, limits)
    assert threads(pipeline.tuned(chosen)) <= limits.threads
    assert best / executor.run(pipeline.tuned(chosen)).time >= 0.95, (chosen, consumer, costs)


def test_the_table_names_the_bottleneck() -> None:
    pipeline = SOURCE.map(abs, parallelism=AUTO).prefetch(AUTO)
    slow = predict(pipeline.tuned({"map": 1, "prefetch": 1}), GUIDE, 10 * MS)
    assert slow.bottleneck == "map"
    tuned = pipeline.tuned(autotune(pipeline, GUIDE, 20 * MS))
    prediction = predict(tuned, GUIDE, 20 * MS)
    assert prediction.bottleneck == "consumer"  # the step takes longer than reading: input no longer matters
    assert prediction.time < slow.time
    rows = {row[0]: row for row in prediction.table()}
    assert rows["map"][2:4] == ("1", "30.000")
    assert [row[0] for row in prediction.table() if row[-1] == "bottleneck"] == ["consumer"]


def test_limits_hold() -> None:
    pipeline = SOURCE.map(abs, parallelism=AUTO).prefetch(AUTO)
    costs = {**GUIDE, "map": Cost(30 * MS, bytes=1000), "prefetch": Cost(0, bytes=1000)}
    assert autotune(pipeline, costs, MS, Limits(bytes=3500)) == {"map": 2, "prefetch": 1}
    assert threads(pipeline.tuned(autotune(pipeline, costs, MS, Limits(threads=3)))) <= 3
    assert autotune(pipeline, costs, MS, Limits(threads=3)) == autotune(pipeline, costs, MS, Limits(threads=3))


def test_what_cannot_be_predicted_says_why() -> None:
    with pytest.raises(InputError, match="no measured cost of operator 'shuffle'"):
        predict(SOURCE.shuffle(3, seed=0), GUIDE)
    with pytest.raises(InputError, match="'prefetch' has no number yet"):
        predict(SOURCE.prefetch(AUTO), GUIDE)
    with pytest.raises(InputError, match="'prefetch' has no number yet"):
        VirtualExecutor(GUIDE, 3).run(SOURCE.prefetch(AUTO))


def test_the_virtual_trace_adds_up() -> None:
    run = VirtualExecutor(GUIDE, 50, 10 * MS).run(SOURCE.map(abs, parallelism=2).prefetch(2), 2)
    spans = run.trace.spans()
    assert run.outputs == 100
    assert sum(s.duration for s in spans if s.kind == "train") == 100 * 10 * MS
    assert sum(s.duration for s in spans if s.kind == "map") == 100 * 30 * MS
    assert sum(s.duration for s in spans if s.kind == "wait") == run.stalled == run.time - 100 * 10 * MS
    for lane in {s.lane for s in spans}:
        ordered = sorted((s.start, s.end) for s in spans if s.lane == lane)
        assert all(first[1] <= second[0] for first, second in itertools.pairwise(ordered))
