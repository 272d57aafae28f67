"""Pipelines: any parallelism gives the plain loop's elements in its order, and any position resumes exactly."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.data.executors.local import LocalExecutor
from armillary.data.executors.nodes import OperatorError
from armillary.data.pipeline import AUTO, Batch, Filter, Interleave, Map, Operator, Pipeline, Prefetch, Shuffle
from armillary.data.policies.autotune import Limits


def triple(value: int) -> int:
    return 3 * value


def is_kept(value: int) -> bool:
    return value % 3 != 1


def spread(value: int) -> list[int]:
    """An iterable of 0 to 4 elements."""
    return [100 * value + index for index in range(value % 5)]


def die(value: int) -> int:
    os._exit(7)


def refuse(value: int) -> int:
    if value >= 5:
        raise ValueError(f"no {value}")
    return value


def plain(values: list[Any], operators: tuple[Operator, ...], epoch: int) -> list[Any]:
    """What the operators mean, without any of the machinery."""
    for operator in operators:
        if isinstance(operator, Map):
            values = [operator.function(value) for value in values]
        elif isinstance(operator, Filter):
            values = [value for value in values if operator.function(value)]
        elif isinstance(operator, Batch):
            values = [tuple(values[i : i + operator.size]) for i in range(0, len(values), operator.size)]
            if operator.drop_remainder:
                values = [value for value in values if len(value) == operator.size]
        elif isinstance(operator, Shuffle):
            windows = [values[i : i + operator.window] for i in range(0, len(values), operator.window)]
            draws = [np.random.default_rng([operator.seed, epoch, n]).permutation(len(w)) for n, w in enumerate(windows)]
            values = [window[index] for window, draw in zip(windows, draws, strict=True) for index in draw]
        elif isinstance(operator, Interleave):
            values = interleaved(values, operator)
    return values


def interleaved(values: list[Any], operator: Interleave) -> list[Any]:
    waiting = iter(values)
    places: list[list[Any] | None] = [list(operator.function(v)) for v in itertools.islice(waiting, operator.cycle)]
    places += [None] * (operator.cycle - len(places))
    given: list[Any] = []
    while any(place is not None for place in places):
        for index, place in enumerate(places):
            if place is not None:
                given += place[: operator.block]
                following = next(waiting, None) if len(place) < operator.block else place[operator.block :]
                places[index] = list(operator.function(following)) if isinstance(following, int) else following
    return given


numbers = st.sampled_from([1, 2, 3, AUTO])
operators = st.one_of(
    st.builds(lambda p: Map("", triple, p), numbers),
    st.just(Filter("", is_kept)),
    st.builds(lambda c, b, p: Interleave("", spread, c, b, p), st.integers(1, 4), st.integers(1, 3), numbers),
    st.builds(lambda w, s: Shuffle("", w, s), st.integers(1, 9), st.integers(0, 9)),
    st.builds(lambda d: Prefetch("", d), numbers),
)
chains = st.tuples(
    st.lists(operators, max_size=4), st.one_of(st.none(), st.builds(lambda n, d: Batch("", n, d, tuple), st.integers(1, 5), st.booleans()))
)


def pipeline_of(count: int, chain: tuple[list[Operator], Batch | None]) -> Pipeline:
    chosen = [*chain[0], *([chain[1]] if chain[1] else [])]
    return Pipeline.of(lambda: range(count)).then(*(replace(o, name=f"{type(o).__name__} {i}") for i, o in enumerate(chosen)))


@given(count=st.integers(0, 30), chain=chains, epoch=st.integers(0, 2))
@settings(max_examples=120)
def test_every_pipeline_gives_what_the_plain_loop_gives(count: int, chain: tuple[list[Operator], Batch | None], epoch: int) -> None:
    pipeline = pipeline_of(count, chain)
    assert list(LocalExecutor().run(pipeline, epoch)) == plain(list(range(count)), pipeline.operators, epoch)


@given(count=st.integers(0, 20), chain=chains, other=st.integers(1, 4), stop=st.integers(0, 20))
@settings(max_examples=120)
def test_a_saved_position_resumes_exactly_at_any_parallelism(
    count: int, chain: tuple[list[Operator], Batch | None], other: int, stop: int
) -> None:
    pipeline = pipeline_of(count, chain)
    expected = plain(list(range(count)), pipeline.operators, 1)
    with LocalExecutor().run(pipeline, 1) as run:
        begun = list(itertools.islice(run, stop))
        state = json.loads(json.dumps(run.state_dict()))
    again = pipeline.tuned(dict.fromkeys(pipeline.knobs(), other))
    rest = LocalExecutor().run(again, 1, state)
    assert rest.outputs == len(begun)
    assert begun + list(rest) == expected


def test_a_position_of_another_pipeline_or_epoch_is_refused() -> None:
    pipeline = Pipeline.of(lambda: range(9)).shuffle(4, seed=1)
    state = LocalExecutor().run(pipeline).state_dict()
    with pytest.raises(InputError, match="of another epoch: 0, not 1"):
        LocalExecutor().run(pipeline, 1, state)
    with pytest.raises(InputError, match="of another pipeline"):
        LocalExecutor().run(Pipeline.of(lambda: range(9)).shuffle(4, seed=2), 0, state)
    LocalExecutor().run(pipeline.prefetch(3), 0, state)  # a buffer changes no order


def test_an_unordered_map_gives_the_same_elements_and_has_no_position() -> None:
    gate = threading.Event()

    def first_waits(value: int) -> int:
        assert value != 0 or gate.wait(20)
        return value

    run = LocalExecutor().run(Pipeline.of(lambda: range(4)).map(first_waits, parallelism=2, ordered=False))
    begun = [next(run), next(run), next(run)]
    assert sorted(begun) == [1, 2, 3]  # went past the one that waits
    gate.set()
    assert list(run) == [0]
    with pytest.raises(InputError, match="no fixed order"):
        run.state_dict()


def test_processes_give_the_same() -> None:
    pipeline = Pipeline.of(lambda: range(20)).map(triple, parallelism=2, workers="process")
    assert list(LocalExecutor().run(pipeline)) == [3 * n for n in range(20)]


BROKEN: list[tuple[Callable[[Pipeline], Pipeline], str]] = [
    (lambda p: p.map(refuse), r"operator 'map' \(map\) failed on element 5 of epoch 0: ValueError: no 5"),
    (lambda p: p.map(refuse, parallelism=3), r"operator 'map' \(map\) failed on element 5 of epoch 0: ValueError: no 5"),
    (lambda p: p.map(refuse, parallelism=2, workers="process"), r"operator 'map' \(map\) failed on element 5 of epoch 0: ValueError: no 5"),
    (lambda p: p.map(lambda x: x, workers="process"), r"operator 'map' \(map\) failed on element 0 .*pickle"),
    (lambda p: p.map(die, workers="process"), r"operator 'map' \(map\) failed on element 0 .*the worker process ended with status 7"),
    (lambda p: p.map(lambda v: next(iter(()))), r"operator 'map' \(map\) failed on element 0 .*StopIteration"),
    (lambda p: p.map(lambda v: next(iter(())), parallelism=2), r"operator 'map' \(map\) failed on element 0 .*StopIteration"),
    (lambda p: p.filter(lambda v: bool(refuse(v))).prefetch(2), r"operator 'filter' \(filter\) failed on element 5"),
    (lambda p: p.batch(4, function=lambda v: refuse(sum(v))), r"operator 'batch' \(batch\) failed on element 0"),
    (lambda p: p.interleave(lambda v: (refuse(v + i) for i in range(6)), cycle=2), r"operator 'interleave' \(interleave\) failed"),
    (lambda p: p.interleave(lambda v: [refuse(v)], cycle=2, parallelism=2), r"operator 'interleave' \(interleave\) failed"),
]


@pytest.mark.parametrize(("build", "message"), BROKEN)
def test_an_error_names_its_operator_wherever_it_ran(build: Callable[[Pipeline], Pipeline], message: str) -> None:
    run = LocalExecutor().run(build(Pipeline.of(lambda: range(9))).prefetch(2, name="last"))
    with pytest.raises(OperatorError, match=message):
        list(run)
    assert list(run) == []  # and the run is closed


def test_a_source_that_fails_is_named() -> None:
    def source() -> Iterator[int]:
        yield 1
        raise OSError("the disk went")

    with pytest.raises(OperatorError, match=r"operator 'source' \(source\) failed on element 1 of epoch 0: OSError: the disk went"):
        list(LocalExecutor().run(Pipeline.of(source).map(triple, parallelism=2).prefetch(1)))


def test_nothing_is_read_further_ahead_than_the_buffers_hold() -> None:
    read = []

    def source() -> Iterator[int]:
        for value in range(1000):
            read.append(value)
            yield value

    with LocalExecutor().run(Pipeline.of(source).map(triple, parallelism=3).prefetch(4)) as run:
        for taken in range(1, 20):
            next(run)
            time.sleep(0.002)
            # In the window 3, in the buffer 4, and one that waits for a place in the window.
            assert len(read) <= taken + 3 + 4 + 1


def test_closing_returns_while_a_call_hangs_and_leaves_no_thread_behind() -> None:
    before, gate = set(threading.enumerate()), threading.Event()

    def hang(value: int) -> int:
        if value == 3:
            gate.wait(60)
        return value

    for build in (
        lambda p: p.map(hang, parallelism=3).prefetch(2),
        lambda p: p.interleave(lambda v: map(hang, [v]), cycle=3, parallelism=3).batch(2).prefetch(1),
    ):
        run = LocalExecutor().run(build(Pipeline.of(lambda: range(100))))
        next(run)
        run.close()
        assert list(run) == []
    gate.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


def test_leaving_a_loop_early_is_no_leak() -> None:
    before = set(threading.enumerate())
    with LocalExecutor().run(Pipeline.of(lambda: itertools.count()).map(triple, parallelism=4).prefetch(8)) as run:
        assert list(itertools.islice(run, 3)) == [0, 3, 6]
    for thread in set(threading.enumerate()) - before:
        thread.join(20)
        assert not thread.is_alive()


def test_auto_is_decided_from_measured_costs_and_changes_no_order() -> None:
    def slow(value: int) -> int:
        time.sleep(0.004)
        return value

    trace = Trace()
    pipeline = Pipeline.of(lambda: range(64)).map(slow, parallelism=AUTO).prefetch()
    run = LocalExecutor(Limits(threads=6), trace).run(pipeline)
    assert run.numbers == {"map": 1, "prefetch": 1}
    assert list(run) == list(range(64))
    assert run.numbers["map"] > 1  # the consumer takes no time: the map was the bottleneck
    assert run.numbers["map"] + 1 <= 6
    assert run.costs()["map"].each >= 4e6
    assert run.prediction().bottleneck == "map"
    assert {span.kind for span in trace.spans()} == {"map", "source", "wait"}
    assert sum(span.kind == "map" for span in trace.spans()) == 64
    following = LocalExecutor(Limits(threads=6)).run(pipeline, 1, numbers=run.tuned())
    assert following.numbers == run.tuned()
    assert list(following) == list(range(64))


def test_numbers_out_of_bounds_and_equal_names_are_refused() -> None:
    pipeline = Pipeline.of(lambda: [])
    with pytest.raises(InputError, match="operator 'map' has parallelism 0, outside 1"):
        pipeline.map(triple, parallelism=0)
    with pytest.raises(InputError, match="several operators named 'map'"):
        pipeline.map(triple).map(triple, name="map")
    with pytest.raises(InputError, match="operator 'batch' has no number to tune"):
        pipeline.batch(2).tuned({"batch": 3})
    assert [o.name for o in pipeline.map(triple).map(triple).operators] == ["map", "map 2"]
