"""Does the simulator predict our own engine: requests served for real and in virtual time, with costs that were measured here before.

    python bench/predict.py [--publish] [--force]      # wants a quiet machine; twelve minutes

For each weight format the engine's iterations are measured as `armillary calibrate --model` does, and never again. Then Poisson requests of
random lengths are served at two rates, shares of the capacity that the simulator gives, by the real engine on its own thread, open loop, each
case several times in turn with the others; and once in virtual time. What the runs of a case have in the median is the truth.

Errors have two readings. A measure's own median and 99th percentile over the run are what Vidur compares (Agrawal et al., MLSys 2024: percentiles
of the normalised latency, at 85 % of the capacity), and have the bar. Request by request they are larger: who just misses an iteration's
beginning waits for a whole one. Beside both stands the floor: the same errors of one real run, taken for a prediction of another.
Fed with the real iterations' durations, the virtual engine must make the real schedules: `replay` says whether it did in every run.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from predict_report import Case, report
from quiet import quiet

from armillary.cluster.others import Others
from armillary.cluster.profile import QUIET_OTHERS
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
from armillary.serve.simulation.comparison import schedules
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.replayed import Witness, run_again
from armillary.serve.workload.arrivals import poisson
from armillary.sim.batch import Batch
from armillary.sim.costs import Fitted
from armillary.sim.costs.fitting import fit

LOADS = (0.4, 0.8)  # of the capacity
OPTIONS: dict[str, Any] = {"kv_memory": "800 MB"}
POLICIES: dict[str, dict[str, Any]] = {  # with one budget the two make the same schedules as long as memory is not short
    "sarathi": {"policy": "sarathi", "max_batch_tokens": 128},
    "vllm": {"policy": "vllm", "max_batch_tokens": 512},
}


@dataclass(frozen=True, slots=True)
class Work:
    """A request: ns after the first one, tokens."""

    at: int
    prompt: int
    answer: int


@dataclass(frozen=True, slots=True)
class Ran:
    """What a run's requests felt, ns. [requests]"""

    ttft: NDArray[np.float64]
    tpot: NDArray[np.float64]
    makespan: float

    @classmethod
    def of(cls, requests: Iterable[Request]) -> Ran:
        times = np.array([(one.arrival, one.first_token, one.last_token, len(one.output)) for one in requests], dtype=np.float64)
        arrival, first, last, tokens = times.T
        return cls(first - arrival, (last - first) / (tokens - 1), float(last.max() - arrival.min()))


@dataclass(slots=True)
class Noted:
    """An executor that keeps what ran and when."""

    inner: Any
    ran: list[tuple[Batch, int, int]] = field(default_factory=list)

    def run(self, plan: Plan) -> Outcome:
        outcome: Outcome = self.inner.run(plan)
        self.ran.append((batch_of(plan), outcome.start, outcome.end))
        return outcome


def workload(rate: float, options: argparse.Namespace) -> list[Work]:
    """The same lengths and, stretched, the same arrivals at every rate."""
    generator = random.Random(options.seed)
    instants = list(islice(poisson(rate, options.seed), options.requests))
    return [Work(at - instants[0], generator.randint(*options.prompts), generator.randint(*options.answers)) for at in instants]


def virtual(config: EngineConfig, cost: Fitted, work: Sequence[Work]) -> Ran:
    engine = VirtualEngine(VirtualExecutor(VirtualClock(), cost), config)
    requests = [
        Request(f"{i}", (0,) * one.prompt, SamplingParams(one.answer, temperature=0.0, ignore_eos=True), arrival=one.at, cache_salt=f"{i}")
        for i, one in enumerate(work)
    ]
    replay(engine, requests)
    return Ran.of(requests)


def capacity(config: EngineConfig, cost: Fitted, work: Sequence[Work]) -> float:
    """Requests a second of an engine that never waits for one."""
    return len(work) * 1e9 / virtual(config, cost, [Work(0, one.prompt, one.answer) for one in work]).makespan


def real(
    loaded: LoadedModel, config: EngineConfig, work: Sequence[Work], seed: int
) -> tuple[Ran, list[tuple[Batch, int, int]], bool, float | None]:
    """Served as they come, by the engine's own thread: what they felt, the iterations, whether the schedules are made again of the durations, and
    what share of the cores others took."""
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
    gc.collect()
    others = Others()
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
    disturbed = others.share(os.cpu_count() or 1)
    again = Trace("again")
    try:
        ends = [span.end for span in trace.spans() if span.lane == "engine"]
        run_again(settle(config, loaded.config, None), requests, witness.seen, ends, again)
        same = schedules(again) == schedules(trace)
    except InputError as error:
        print(f"replay: {error}", file=sys.stderr)
        same = False
    return Ran.of(requests), noted.ran, same, disturbed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--prompts", type=int, nargs=2, default=(32, 192), help="tokens, from and to")
    parser.add_argument("--answers", type=int, nargs=2, default=(8, 40), help="tokens, from and to")
    parser.add_argument("--runs", type=int, default=3, help="real ones of a case, at least 2")
    parser.add_argument("--seconds", type=float, default=30.0, help="of calibration, a weight format")
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
    cases: list[Case] = []
    fits, disturbed = [], []
    for weights in options.weights:
        config = EngineConfig(quantize=weights, **OPTIONS)
        engine = build_engine(loaded, config, trace=Trace())
        others = Others()
        samples = calibration.measure(engine, loaded.config.vocab_size, seconds=options.seconds, seed=options.seed + 1)
        disturbed.append(others.share(os.cpu_count() or 1) or 0.0)
        settled = engine.config
        del engine
        gc.collect()  # its KV pool
        model = fit(f"smollm2 {weights} here", samples)
        most = capacity(settled, model, workload(1.0, options))
        name = "fp32" if weights == "none" else weights
        fits.append(
            f"{name}: {len(samples)} iterations measured; wrong by {model.errors}; others took {disturbed[-1]:.1%} of the cores' time."
        )
        print(f"{fits[-1]} Capacity {most:.1f} requests/s.", flush=True)
        own = [
            (policy, share, Case(f"{name}, {policy}, {share:.0%} ({share * most:.1f}/s)")) for policy in options.policies for share in LOADS
        ]
        for _ in range(options.runs):  # in turn, so that a machine that drifts does so in every case
            for policy, share, case in own:
                config = EngineConfig(quantize=weights, **POLICIES[policy], **OPTIONS)
                case.add(*real(loaded, config, workload(share * most, options), options.seed), model)
                gc.collect()
        for policy, share, case in own:
            config = settle(EngineConfig(quantize=weights, **POLICIES[policy], **OPTIONS), loaded.config, None)
            case.virtual = virtual(config, model, workload(share * most, options))
        cases += [case for _, _, case in own]
    text = report(cases, fits, options, seconds=time.monotonic() - began, load=(before, os.getloadavg()[0]))
    print(f"\n{text}")
    most_disturbed = max(*disturbed, *(max(case.disturbed) for case in cases))
    if options.publish and most_disturbed > QUIET_OTHERS and not options.force:
        print(f"not published: others took {most_disturbed:.0%} of the cores' time meanwhile; --force publishes it", file=sys.stderr)
        return 2
    if options.publish:
        (Path(__file__).parent / "results" / "predict.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
