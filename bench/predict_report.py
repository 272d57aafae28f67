"""The tables of `predict.py`: errors of what was predicted, and of one real run taken for a prediction of another."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import pairwise, permutations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from table import markdown

from armillary.cluster.machine import describe
from armillary.sim.batch import Batch
from armillary.sim.costs import Fitted

if TYPE_CHECKING:
    from predict import Ran

MEDIAN, P99 = 0.09, 0.20  # bars
IDLE = 20_000_000  # ns between iterations, from which on nobody was there


@dataclass(frozen=True, slots=True)
class Errors:
    """Of a measure over a run: of its own median and 99th percentile; and |predicted - real| / real by request, the median."""

    p50: float
    p99: float
    each: float

    @classmethod
    def of(cls, real: Sequence[NDArray[np.float64]], said: NDArray[np.float64]) -> Errors:
        """Of real runs the median counts: of their percentiles, and of each request's values."""
        p50, p99 = (abs(np.quantile(said, q) / statistics.median(np.quantile(run, q) for run in real) - 1) for q in (0.5, 0.99))
        return cls(float(p50), float(p99), float(np.median(np.abs(said / np.median(real, axis=0) - 1))))

    @classmethod
    def mean(cls, several: Sequence[Errors]) -> Errors:
        return cls(*(statistics.fmean(getattr(one, name) for one in several) for name in ("p50", "p99", "each")))


@dataclass(slots=True)
class Case:
    """Real runs of the same requests, and the virtual one."""

    name: str
    runs: list[Ran] = field(default_factory=list)
    iterations: list[dict[str, float]] = field(default_factory=list)
    replayed: list[bool] = field(default_factory=list)
    disturbed: list[float] = field(default_factory=list)
    virtual: Ran | None = None

    def add(self, ran: Ran, iterations: Sequence[tuple[Batch, int, int]], same: bool, disturbed: float | None, model: Fitted) -> None:
        self.runs.append(ran)
        self.iterations.append(_priced(model, iterations))
        self.replayed.append(same)
        self.disturbed.append(disturbed or 0.0)

    def errors(self, measure: str) -> Errors:
        return Errors.of([getattr(run, measure) for run in self.runs], getattr(self.virtual, measure))

    def floor(self, measure: str) -> Errors:
        """The mean over all pairs of runs, both ways."""
        return Errors.mean([Errors.of([getattr(one, measure)], getattr(other, measure)) for one, other in permutations(self.runs, 2)])

    @property
    def makespan(self) -> float:
        assert self.virtual is not None
        return abs(self.virtual.makespan / statistics.median(run.makespan for run in self.runs) - 1)


def report(cases: Sequence[Case], fits: Sequence[str], options: argparse.Namespace, *, seconds: float, load: tuple[float, float]) -> str:
    machine = describe()
    return (
        f"# The simulator beside the engine\n\n{machine.cpu}, {machine.physical_cores} cores, SmolLM2-135M, {options.requests} Poisson requests a run, prompts of "
        f"{options.prompts[0]} to {options.prompts[1]} tokens, answers of {options.answers[0]} to {options.answers[1]}. `python bench/predict.py`, "
        f"{datetime.now(UTC):%Y-%m-%d}, {seconds:.0f} s.\nLoad average {load[0]:.2f} before, {load[1]:.2f} after (the bench's own threads included); others took at "
        f"most {max(max(case.disturbed) for case in cases):.1%} of the cores' time in a run.\n"
        f"The truth is the median of {options.runs} real runs of the same requests. sarathi computes at most 128 tokens an iteration, vllm 512.\n\n"
        f"Errors of each measure's own median and 99th percentile over the run, which is how Vidur compares. The bar: medians and makespan under {MEDIAN:.0%}, "
        f"99th percentiles under {P99:.0%}. Replay: the schedules of the virtual engine when the real iterations' durations are fed back.\n\n{_bar(cases)}\n\n"
        f"The floor: the same errors of one real run, taken for a prediction of another (the mean over all pairs). Where it is over the bar, in bold, no predictor can be "
        f"sure to meet it.\n\n{_floor(cases)}\n\nRequest by request, |predicted - real| / real in the median:\n\n{_each(cases)}\n\n"
        f"The measures themselves:\n\n{_measures(cases)}\n\nThe cost model on the very iterations that ran, without queues:\n\n{_iterations(cases)}\n\n"
        f"Calibration: {' '.join(fits)}\n"
    )


def met(case: Case) -> bool:
    measures = [case.errors(name) for name in ("ttft", "tpot")]
    return case.makespan < MEDIAN and all(one.p50 < MEDIAN and one.p99 < P99 for one in measures)


def _bar(cases: Sequence[Case]) -> str:
    lines = [["weights, policy, load", "TTFT: median", "p99", "TPOT: median", "p99", "makespan", "met", "replay"]]
    for case in cases:
        ttft, tpot = case.errors("ttft"), case.errors("tpot")
        off = (ttft.p50, ttft.p99, tpot.p50, tpot.p99, case.makespan)
        same = "identical" if all(case.replayed) else "DIFFERENT"
        lines.append([case.name, *(f"{one:.1%}" for one in off), "yes" if met(case) else "no", same])
    return markdown(lines)


def _floor(cases: Sequence[Case]) -> str:
    lines = [["real runs among themselves", "TTFT: median", "p99", "TPOT: median", "p99"]]
    for case in cases:
        ttft, tpot = case.floor("ttft"), case.floor("tpot")
        shown = ((ttft.p50, MEDIAN), (ttft.p99, P99), (tpot.p50, MEDIAN), (tpot.p99, P99))
        lines.append([case.name, *(_against(off, bar) for off, bar in shown)])
    return markdown(lines)


def _each(cases: Sequence[Case]) -> str:
    lines = [["by request", "TTFT: predicted", "two real runs", "TPOT: predicted", "two real runs"]]
    for case in cases:
        columns = [one for name in ("ttft", "tpot") for one in (case.errors(name).each, case.floor(name).each)]
        lines.append([case.name, *(_against(one, MEDIAN) if place % 2 else f"{one:.1%}" for place, one in enumerate(columns))])
    return markdown(lines)


def _against(off: float, bar: float) -> str:
    return f"{off:.1%}" if off < bar else f"**{off:.1%}**"


def _measures(cases: Sequence[Case]) -> str:
    def spread(runs: Sequence[NDArray[np.float64]]) -> str:
        return ", ".join(f"{statistics.median(np.quantile(run, q) for run in runs) / 1e6:,.1f}" for q in (0.5, 0.99)) + " ms"

    lines = [["p50, p99", "real TTFT", "predicted", "real TPOT", "predicted", "real makespan", "predicted"]]
    for case in cases:
        virtual = case.virtual
        assert virtual is not None
        get: Callable[[Any, str], NDArray[np.float64]] = getattr
        shown = [spread(runs) for name in ("ttft", "tpot") for runs in ([get(run, name) for run in case.runs], [get(virtual, name)])]
        spans = (statistics.median(run.makespan for run in case.runs), virtual.makespan)
        lines.append([case.name, *shown, *(f"{span / 1e9:.2f} s" for span in spans)])
    return markdown(lines)


def _iterations(cases: Sequence[Case]) -> str:
    lines = [
        ["where errors come from", "iterations", "mean", "an iteration's error", "p90", "bias of all, by run", "host between", "predicted"]
    ]
    for case in cases:
        mean = {name: statistics.fmean(one[name] for one in case.iterations) for name in case.iterations[0]}
        biases = ", ".join(f"{one['bias']:+.1%}" for one in case.iterations)
        lines.append(
            [case.name, f"{mean['iterations']:,.0f}", f"{mean['ms']:.1f} ms", f"{mean['median']:.1%}", f"{mean['p90']:.1%}", biases,
             f"{mean['host']:.2f} ms", f"{mean['host said']:.2f} ms"]
        )  # fmt: skip
    return markdown(lines)


def _priced(model: Fitted, ran: Sequence[tuple[Batch, int, int]]) -> dict[str, float]:
    """How the model prices the very iterations that ran: apart from queues, where errors add up."""
    off, gaps, said = [], [], []
    for (batch, start, end), (_, following, _) in pairwise(ran):
        beside = model.host.of(batch)
        off.append(((model.iteration(batch) - beside) - (end - start)) / (end - start))
        if following - end < IDLE:
            gaps.append(following - end)
            said.append(beside)
    took = sum(end - start for _, start, end in ran[:-1])
    return {
        "iterations": len(ran),
        "median": statistics.median(map(abs, off)),
        "p90": float(np.quantile(np.abs(off), 0.9)),
        "bias": sum(wrong * (end - start) for wrong, (_, start, end) in zip(off, ran, strict=False)) / took,
        "host": statistics.median(gaps) / 1e6,
        "host said": statistics.median(said) / 1e6,
        "ms": took / len(ran) / 1e6,
    }
