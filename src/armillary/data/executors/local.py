"""A pipeline carried out on this machine: threads and processes ahead of the consumer, the order always that of the plain loop.

Every element travels with the position after it: a JSON value from which the rest of the epoch follows exactly, whatever was read ahead
of it. So a run is saved between any two elements and resumed with other parallelism, buffers or workers.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final

from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.data.executors.ahead import InterleaveNode, ParallelMapNode, PrefetchNode
from armillary.data.executors.nodes import BatchNode, FilterNode, MapNode, Node, ShuffleNode, SourceNode
from armillary.data.pipeline import Batch, Filter, Interleave, Map, Pipeline, Prefetch, Shuffle
from armillary.data.policies.autotune import CONSUMER, Cost, Limits, Prediction, autotune, predict

FIRST_TUNING: Final = 8  # outputs after which AUTO is decided for the first time; then after twice as many, and so on


class LocalExecutor:
    """Runs pipelines; `limits` bounds what AUTO may use. With a trace, every call of every operator is a span in it."""

    def __init__(self, limits: Limits | None = None, trace: Trace | None = None) -> None:
        self.limits, self.trace = limits or Limits(), trace

    def run(
        self, pipeline: Pipeline, epoch: int = 0, state: Mapping[str, Any] | None = None, numbers: Mapping[str, int] | None = None
    ) -> Run:
        """One epoch's elements, from the beginning or from where a run of the same pipeline was saved.

        `numbers` are what AUTO begins with, such as an earlier run's `tuned()`; without them it begins with 1. Raises `InputError` for a
        state of another pipeline or epoch.
        """
        return Run(pipeline, epoch, state, self.limits, self.trace, numbers or {})


class Run(Iterator[Any]):
    """An epoch in progress: iterate over it. Use it as a context, or call `close`, when it may be left before its end."""

    def __init__(
        self,
        pipeline: Pipeline,
        epoch: int,
        state: Mapping[str, Any] | None,
        limits: Limits,
        trace: Trace | None,
        numbers: Mapping[str, int],
    ) -> None:
        self._closed = True  # until everything is built
        self.pipeline, self.epoch, self._limits, self.trace = pipeline, epoch, limits, trace
        self.outputs, position = 0, None
        if state is not None:
            saved = {"version": state.get("version"), "pipeline": state.get("pipeline"), "epoch": state.get("epoch")}
            mine = {"version": 1, "pipeline": pipeline.order(), "epoch": epoch}
            if differing := [key for key in mine if mine[key] != saved[key]]:
                raise InputError(
                    f"the saved position is of another {differing[0]}: {str(saved[differing[0]])[:200]}, not {str(mine[differing[0]])[:200]}",
                    "resume with the pipeline and the epoch that were saved",
                )
            position, self.outputs = state.get("position"), int(state.get("outputs", 0))
        self._position = position
        self.numbers: dict[str, int] = {name: value or numbers.get(name, 1) for name, value in pipeline.knobs().items()}
        pipeline.tuned(self.numbers)  # bounds are checked
        self._next_tuning = FIRST_TUNING
        self.nodes: list[Node] = []
        self._left = 0  # when the consumer was last given something, ns; 0 before that
        self._thinking, self._waited, self._started = 0, 0, 0  # ns; `_started` counts this run's own outputs
        self._closed = False
        try:
            self._last = build(self, len(pipeline.operators), position)
        except BaseException:
            self.close()
            raise

    def __next__(self) -> Any:
        if self._closed:
            raise StopIteration
        asked = time.perf_counter_ns()
        if self._left:
            self._thinking += asked - self._left
        try:
            value, self._position = self._last.next()
        except BaseException:
            self.close()
            raise
        self._left = time.perf_counter_ns()
        self._waited += self._left - asked
        if self.trace is not None:
            self.trace.add(CONSUMER, "wait", asked, self._left)
        self.outputs, self._started = self.outputs + 1, self._started + 1
        if self._started == self._next_tuning:
            self._tune()
        return value

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Stops the workers. Returns at once, or within a second where a call is in progress, which then ends on its own."""
        if self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + 1
        for thread in [thread for node in self.nodes for thread in node.close()]:
            if thread.ident is not None and thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def state_dict(self) -> dict[str, Any]:
        """JSON data: the position after the last element that was given. Raises `InputError` where an unordered map has no position."""
        for operator in self.pipeline.operators:
            if isinstance(operator, Map) and not operator.ordered:
                raise InputError(f"operator {operator.name!r} gives its elements in no fixed order", "use ordered=True to save a position")
        order = self.pipeline.order()
        return {"version": 1, "pipeline": order, "epoch": self.epoch, "outputs": self.outputs, "position": self._position}

    def costs(self) -> dict[str, Cost]:
        """What was measured so far, for `policies.autotune` and for the virtual executor."""
        return {node.name: node.cost() for node in self.nodes}

    @property
    def consumer(self) -> float:
        """ns that the consumer took an output."""
        return self._thinking / max(1, self._started - 1)

    @property
    def stalled(self) -> float:
        """The share of the consumer's time that it waited for input."""
        return self._waited / max(1, self._waited + self._thinking)

    def prediction(self) -> Prediction:
        """The model of this run as it is now: its table names the bottleneck."""
        return predict(self.pipeline.tuned(self.numbers), self.costs(), self.consumer)

    def tuned(self) -> dict[str, int]:
        """What the autotuner makes of this run's costs: numbers for `LocalExecutor.run` to begin the next epoch with."""
        return autotune(self.pipeline, self.costs(), self.consumer, self._limits) if self._started > 1 else dict(self.numbers)

    def _tune(self) -> None:
        self._next_tuning *= 2
        if self.pipeline.automatic():
            chosen = self.tuned()
            self.numbers |= chosen
            for node in self.nodes:
                if node.name in chosen:
                    node.resize(chosen[node.name])


def build(run: Run, count: int, position: Any) -> Node:
    """The node of the first `count` operators, at a position."""
    if count == 0:
        return SourceNode(run, position)
    operator = run.pipeline.operators[count - 1]

    def upstream(position: Any) -> Node:
        return build(run, count - 1, position)

    if isinstance(operator, Shuffle):
        return ShuffleNode(run, operator, upstream, position)
    if isinstance(operator, Interleave):
        return InterleaveNode(run, operator, upstream, position)
    below = upstream(position)
    if isinstance(operator, Prefetch):
        return PrefetchNode(run, operator, below)
    if isinstance(operator, Batch):
        return BatchNode(run, operator, below)
    if isinstance(operator, Filter):
        return FilterNode(run, operator, below)
    if operator.parallelism == 1 and operator.workers == "thread":
        return MapNode(run, operator, below)
    return ParallelMapNode(run, operator, below)
