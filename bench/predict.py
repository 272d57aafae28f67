"""Does the simulator predict our own engine: requests served for real and in virtual time, with costs that were measured here before.

    python bench/predict.py [--publish] [--force]      # wants a quiet machine; six minutes

For each weight format the engine's iterations are measured as `armillary calibrate --model` does, and never again. Then Poisson requests
of random lengths are served at two rates, shares of the capacity that the simulator gives, by the real engine on its own thread, open loop;
and the same requests, arriving when they did, by the same engine in virtual time.

Errors are told twice: by request (|virtual - real| / real; their median has the bar), and of the measure's own median and 99th percentile, as
Vidur tells them (the 99th has the bar). By request the worst are far off whoever predicts: who just misses an iteration's beginning waits for
a whole one, so two simulations whose iterations differ by 1 % differ by 15 to 65 % at their 99th percentile, and two real runs do, too. The
last table has both. Fed with the real iterations' durations, the virtual engine must make the real schedules: `replay` says whether it did.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from quiet import quiet
from table import markdown

from armillary.cluster.machine import describe
from armillary.core.clock import VirtualClock
from armillary.core.errors import InputError
from armillary.core.trace import Trace
from armillary.models.load import LoadedModel, load
from armillary.serve import calibration
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor, batch_of
from armillary.serve.kv_pool import settle
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.schedule import Outcome, Plan
from armillary.serve.simulation.comparison import Comparison, Errors, compare, schedules
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.replayed import Witness, run_again
from armillary.serve.workload.arrivals import poisson
from armillary.sim.batch import Batch
from armillary.sim.costs import CostModel, Fitted
from armillary.sim.costs.fitting import fit

MEDIAN, P99 = 0.09, 0.20  # bars
LOADS = (0.4, 0.8)  # of the capacity
OPTIONS: dict[str, Any] = {"kv_memory": "800 MB"}
POLICIES: dict[str, dict[str, Any]] = {  # with one budget the two make the same schedules as long as memory is not short
    "sarathi": {"policy": "sarathi", "max_batch_tokens": 128},
    "vllm": {"policy": "vllm", "max_batch_tokens": 512},
}
TWICE = ("sarathi", 0.8)  # the case that is run for real twice
OFF = 1.01  # for how much the errors of a cost model grow in queues


@dataclass(frozen=True, slots=True)
class Work:
    """A request: ns after the first one, tokens."""

    at: int
    prompt: int
    answer: int


@dataclass(slots=True)
class Noted:
    """An executor that keeps what ran and when."""

    inner: Any
    ran: list[tuple[Batch, int, int]] = field(default_factory=list)

    def run(self, plan: Plan) -> Outcome:
        outcome: Outcome = self.inner.run(plan)
        self.ran.append((batch_of(plan), outcome.start, outcome.end))
        return outcome


@dataclass(frozen=True, slots=True)
class Slower:
    """Another cost model, `factor` times as slow."""

    inner: CostModel
    factor: float
    name: str = "slower"

    def iteration(self, batch: Batch) -> int:
        return round(self.inner.iteration(batch) * self.factor)

    def decodes(self, sequences: int, cached: int, count: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        return np.rint(self.inner.decodes(sequences, cached, count) * self.factor).astype(np.int64)


def workload(rate: float, options: argparse.Namespace) -> list[Work]:
    """The same lengths and, stretched, the same arrivals at every rate."""
    generator = random.Random(options.seed)
    instants = list(islice(poisson(rate, options.seed), options.requests))
    return [Work(at - instants[0], generator.randint(*options.prompts), generator.randint(*options.answers)) for at in instants]


def virtual(config: EngineConfig, cost: CostModel, work: Sequence[tuple[int, int, int]]) -> Trace:
    trace = Trace("virtual")
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), cost), config, trace=trace)
    replay(
        engine,
        [
            Request(f"{i}", (0,) * prompt, SamplingParams(answer, temperature=0.0, ignore_eos=True), arrival=at, cache_salt=f"{i}")
            for i, (at, prompt, answer) in enumerate(work)
        ],
    )
    return trace


def capacity(config: EngineConfig, cost: CostModel, work: Sequence[Work]) -> float:
    """Requests a second of an engine that never waits for one."""
    steps = [span for span in virtual(config, cost, [(0, one.prompt, one.answer) for one in work]).spans() if span.lane == "engine"]
    return len(work) * 1e9 / (steps[-1].end - steps[0].start)


def real(loaded: LoadedModel, config: EngineConfig, work: Sequence[Work], seed: int) -> tuple[Trace, list[Request], Noted, Witness]:
    """Served as they come, by the engine's own thread."""
    trace = Trace("real")
    engine = build_engine(loaded, config, trace=trace)
    vocabulary, generator = loaded.config.vocab_size, random.Random(seed + 1)
    calibration.warm(engine, vocabulary)
    noted = engine.executor = Noted(engine.executor)
    witness = engine.policy = Witness(engine.policy)
    requests = [
        Request(
            f"{i}",
            tuple(generator.randrange(vocabulary) for _ in range(one.prompt)),
            SamplingParams(one.answer, temperature=0.0, ignore_eos=True),
        )
        for i, one in enumerate(work)
    ]
    engine.start()
    try:
        begin = time.perf_counter_ns() + 20_000_000
        for one, request in zip(work, requests, strict=True):
            if (left := begin + one.at - time.perf_counter_ns()) > 0:
                time.sleep(left / 1e9)
            engine.submit(request)
        engine.run_until_idle()
    finally:
        engine.stop()
    return trace, requests, noted, witness


def iterations(model: Fitted, noted: Noted) -> dict[str, float]:
    """How the model prices the very iterations that ran: apart from queues, where errors add up."""
    off, gaps, said = [], [], []
    for (batch, start, end), (_, following, _) in pairwise(noted.ran):
        beside = model.host.of(batch)
        off.append(((model.iteration(batch) - beside) - (end - start)) / (end - start))
        if following - end < 20_000_000:  # else it was idle
            gaps.append(following - end)
            said.append(beside)
    took = sum(end - start for _, start, end in noted.ran[:-1])
    bias = sum(wrong * (end - start) for wrong, (_, start, end) in zip(off, noted.ran, strict=False)) / took
    return {
        "iterations": len(noted.ran),
        "median": statistics.median(map(abs, off)),
        "p90": float(np.quantile(np.abs(off), 0.9)),
        "bias": bias,
        "host": statistics.median(gaps) / 1e6,
        "host said": statistics.median(said) / 1e6,
        "ms": took / len(noted.ran) / 1e6,
    }


def case(
    loaded: LoadedModel, model: Fitted, weights: str, policy: str, share: float, rate: float, options: argparse.Namespace
) -> dict[str, Any]:
    config = EngineConfig(quantize=weights, **POLICIES[policy], **OPTIONS)
    trace, requests, noted, witness = real(loaded, config, workload(rate, options), options.seed)
    gc.collect()
    settled = settled_config(loaded, config)
    base = min(request.arrival or 0 for request in requests)
    work = [((request.arrival or 0) - base, len(request.prompt), len(request.output)) for request in requests]
    predicted = virtual(settled, model, work)
    again = Trace("again")
    try:
        run_again(settled, requests, witness.seen, [span.end for span in trace.spans() if span.lane == "engine"], again)
        same = schedules(again) == schedules(trace)
    except InputError as error:
        print(f"replay: {error}", file=sys.stderr)
        same = False
    return {
        "weights": "fp32" if weights == "none" else weights,
        "policy": policy,
        "share": share,
        "rate": rate,
        "found": compare(trace, predicted),
        "replay": same,
        "shaken": compare(predicted, virtual(settled, Slower(model, OFF), work)),
        "iterations": iterations(model, noted),
        "twice": compare(trace, real(loaded, config, workload(rate, options), options.seed)[0]) if (policy, share) == TWICE else None,
    }


def settled_config(loaded: LoadedModel, config: EngineConfig) -> EngineConfig:
    """With as many KV blocks as the real engine has."""
    return settle(config, loaded.config, None)


def met(off: Errors) -> bool:
    return off.median < MEDIAN and off.of_p99 < P99


def report(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        ["weights, policy, load", "TTFT: median error", "of its p99", "TPOT: median error", "of its p99", "makespan", "met", "replay"],
    ]
    for row in rows:
        found: Comparison = row["found"]
        good = met(found.ttft) and met(found.tpot) and found.makespan_error < MEDIAN
        off = (found.ttft.median, found.ttft.of_p99, found.tpot.median, found.tpot.of_p99, found.makespan_error)
        lines.append([name(row), *(f"{one:.1%}" for one in off), "yes" if good else "no", "identical" if row["replay"] else "DIFFERENT"])
    return markdown(lines)


def metrics(rows: Sequence[dict[str, Any]]) -> str:
    """The measures themselves."""
    lines = [["p50, p99", "real TTFT", "predicted", "real TPOT", "predicted", "error of TTFT's p50", "of TPOT's p50"]]
    for row in rows:
        found: Comparison = row["found"]
        shown = [
            ", ".join(f"{np.quantile(values, q) / 1e6:,.1f}" for q in (0.5, 0.99)) + " ms"
            for what in ("ttft", "tpot")
            for side in (0, 1)
            if (values := [value for pair in found.requests.values() if (value := getattr(pair[side], what)) is not None])
        ]
        lines.append([name(row), *shown, f"{found.ttft.of_median:.1%}", f"{found.tpot.of_median:.1%}"])
    return markdown(lines)


def sources(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        ["where errors come from", "iterations", "mean", "an iteration's error", "p90", "bias of all", "host between", "predicted"],
    ]  # fmt: skip
    for row in rows:
        of = row["iterations"]
        lines.append(
            [name(row), f"{of['iterations']:,}", f"{of['ms']:.1f} ms", f"{of['median']:.1%}", f"{of['p90']:.1%}", f"{of['bias']:+.1%}",
             f"{of['host']:.2f} ms", f"{of['host said']:.2f} ms"]
        )  # fmt: skip
    return markdown(lines)


def worst(rows: Sequence[dict[str, Any]]) -> str:
    """Errors by request at the 99th percentile, beside what they are between runs that nobody predicted."""
    lines = [
        [
            "p99 of errors by request",
            "TTFT",
            "TPOT",
            f"simulated, {OFF - 1:.0%} slower: TTFT",
            "TPOT",
            "real, twice: TTFT",
            "TPOT",
            "median",
        ]
    ]
    for row in rows:
        found, shaken, twice = row["found"], row["shaken"], row["twice"]
        again = (
            ["-"] * 3
            if twice is None
            else [f"{twice.ttft.p99:.0%}", f"{twice.tpot.p99:.0%}", f"{twice.ttft.median:.1%}, {twice.tpot.median:.1%}"]
        )
        lines.append([name(row), *(f"{one.p99:.0%}" for one in (found.ttft, found.tpot, shaken.ttft, shaken.tpot)), *again])
    return markdown(lines)


def name(row: dict[str, Any]) -> str:
    return f"{row['weights']}, {row['policy']}, {row['share']:.0%} ({row['rate']:.1f}/s)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompts", type=int, nargs=2, default=(32, 192), help="tokens, from and to")
    parser.add_argument("--answers", type=int, nargs=2, default=(8, 40), help="tokens, from and to")
    parser.add_argument("--seconds", type=float, default=20.0, help="of calibration, a weight format")
    parser.add_argument("--weights", nargs="+", default=("int4", "none"))
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help="write bench/results/predict.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before, began = os.getloadavg()[0], time.monotonic()
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    rows: list[dict[str, Any]] = []
    fits = []
    for weights in options.weights:
        config = EngineConfig(quantize=weights, **OPTIONS)
        engine = build_engine(loaded, config, trace=Trace())
        samples = calibration.measure(engine, loaded.config.vocab_size, seconds=options.seconds)
        settled = engine.config
        del engine
        gc.collect()  # its KV pool
        model = fit(f"smollm2 {weights} here", samples)
        fits.append(f"{'fp32' if weights == 'none' else weights}: {len(samples)} iterations measured; wrong by {model.errors}.")
        most = capacity(settled, model, workload(1.0, options))
        print(f"{fits[-1]} Capacity {most:.1f} requests/s.", flush=True)
        for policy in options.policies:
            for share in LOADS:
                rows.append(case(loaded, model, weights, policy, share, share * most, options))
                print(report(rows).splitlines()[-1], flush=True)
    text = (
        f"# The simulator beside the engine\n\n{describe().cpu}, {describe().physical_cores} cores, SmolLM2-135M, {options.requests} Poisson requests a row, prompts of "
        f"{options.prompts[0]} to {options.prompts[1]} tokens, answers of {options.answers[0]} to {options.answers[1]}. `python bench/predict.py`, "
        f"{datetime.now(UTC):%Y-%m-%d}, {time.monotonic() - began:.0f} s.\nLoad average {before:.2f} before, {os.getloadavg()[0]:.2f} after "
        f"(the bench's own threads included).\nErrors by request are |virtual - real| / real: their median is to be under {MEDIAN:.0%}, as is that of the makespan; "
        f"the measure's own 99th percentile is to be within {P99:.0%}.\nReplay: the schedules of the virtual engine when the real iterations' durations "
        f"are fed back. sarathi computes at most {POLICIES['sarathi']['max_batch_tokens']} tokens an iteration, vllm {POLICIES['vllm']['max_batch_tokens']}.\n\n"
        f"{report(rows)}\n\n{metrics(rows)}\n\nThe cost model on the very iterations that ran, without queues:\n\n{sources(rows)}\n\n"
        f"Who just misses an iteration's beginning waits for a whole one, so single requests are far off between any two runs:\n\n{worst(rows)}\n\n"
        f"Calibration: {' '.join(fits)}\n"
    )
    print(f"\n{text}")
    if options.publish:
        (Path(__file__).parent / "results" / "predict.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
