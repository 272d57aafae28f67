"""Orca (Yu et al., OSDI 2022): scheduling by the iteration against scheduling by the request, in virtual time."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from typing import Final

from armillary.core.clock import VirtualClock
from armillary.core.trace import Trace
from armillary.core.units import S
from armillary.reproduce.registry import Experiment, Result, Row, exactly
from armillary.serve.config import EngineConfig
from armillary.serve.engine import Engine
from armillary.serve.executors.scripted import Cost, ScriptedExecutor, linear_cost, replay, unit_cost
from armillary.serve.request import Request, SamplingParams

# GPT-3 175B in fp16 on 16 A100 (40 GB), tensor parallel over 8, pipelined over 2, one batch in flight, at the roofline: an iteration reads
# every weight once through 8 GPUs' memories at a time, and a token costs 2 FLOPs a parameter at half of 8 GPUs' peak.
_PARAMETERS: Final = 175e9
_GPUS_AT_ONCE: Final = 8
_A100_BYTES: Final = 1.555e12  # bytes/s
_A100_FLOPS: Final = 312e12  # FLOP/s, fp16
_ITERATION: Final = 2 * _PARAMETERS / (_GPUS_AT_ONCE * _A100_BYTES) * S  # ns
_TOKEN: Final = 2 * _PARAMETERS / (_GPUS_AT_ONCE * _A100_FLOPS * 0.5) * S  # ns

_REQUESTS: Final = 300
_SEATS: Final = 32

Job = tuple[int, int, int]
"""Arrival in ns, prompt tokens, answer tokens."""


def serve(policy: str, jobs: Sequence[Job], cost: Cost, seats: int, trace: Trace | None = None) -> tuple[list[Request], Engine]:
    """Run the jobs under a policy to their end in virtual time; memory never binds."""
    clock = VirtualClock()
    config = EngineConfig.model_validate(
        {"policy": policy, "kv_blocks": 1 << 14, "max_running": seats, "max_batch_tokens": 1 << 16, "prefix_cache": "off"}
    )
    engine = Engine(ScriptedExecutor(clock, cost=cost), config, clock=clock, trace=trace)
    requests = [
        Request(f"{index:03d}", (1,) * prompt, SamplingParams(max_tokens=answer, ignore_eos=True), arrival=arrival)
        for index, (arrival, prompt, answer) in enumerate(jobs)
    ]
    replay(engine, clock, requests)
    return requests, engine


def latency(request: Request) -> int:
    """ns from arrival to return."""
    assert request.arrival is not None
    assert request.finished is not None
    return request.finished - request.arrival


def normalised_latency(policy: str, rate: float, seats: int = _SEATS) -> float:
    """Median over requests of latency a generated token (ns), at `rate` requests a second."""
    requests, _ = serve(policy, workload(rate), linear_cost(_ITERATION, _TOKEN), seats)
    return statistics.median(latency(request) / len(request.output) for request in requests)


def workload(rate: float, count: int = _REQUESTS) -> list[Job]:
    """Poisson arrivals; prompts of 32 to 512 tokens and answers of 1 to 128, uniform. The same lengths at every rate."""
    draw, at, jobs = random.Random(0), 0.0, []
    for _ in range(count):
        at += draw.expovariate(1.0)
        jobs.append((round(at / rate * S), draw.randint(32, 512), draw.randint(1, 128)))
    return jobs


def throughput_within(policy: str, bound: float) -> float:
    """The highest rate (requests/s, to 2 %) at which the median normalised latency stays within `bound` ns."""
    low, high = 0.05, 40.0
    while high / low > 1.02:
        middle = (low * high) ** 0.5
        if normalised_latency(policy, middle) <= bound:
            low = middle
        else:
            high = middle
    return low


def run() -> Result:
    lengths = [(0, 1, 2), (0, 1, 5), (0, 1, 9)]
    by_request, _ = serve("request-level", lengths, unit_cost(), seats=3)
    by_iteration, _ = serve("orca", lengths, unit_cost(), seats=3)
    alone = normalised_latency("orca", 0.01)
    rates = {policy: throughput_within(policy, 2 * alone) for policy in ("request-level", "orca")}
    pictures, preemptions = [], 0
    for policy in ("request-level", "orca"):
        trace = Trace(policy)
        _, engine = serve(policy, workload(rates["orca"] / 2, 24), linear_cost(_ITERATION, _TOKEN), 8, trace)
        preemptions += engine.stats.preemptions if policy == "orca" else 0
        pictures.append((f"{policy}: the first 24 requests at {rates['orca'] / 2:.1f} a second, 8 seats", trace))
    closed_form = "closed form: answers of 2, 5 and 9 tokens in one batch, an iteration takes 1"
    rows = (
        exactly("mean latency, batches by the request", "iterations", 9, closed_form, statistics.mean(map(latency, by_request))),
        exactly("mean latency, batches by the iteration", "iterations", 16 / 3, closed_form, statistics.mean(map(latency, by_iteration))),
        exactly("preemptions under Orca", "", 0, "by construction: memory is reserved at admission", preemptions),
        Row(
            "throughput at the same latency, by the iteration over by the request",
            "x",
            36.9,
            "abstract: GPT-3 175B, Orca against FasterTransformer",
            rates["orca"] / rates["request-level"],
            5.0,
            36.9,
            "5 or more: the scheduling alone; the published ratio also compares the engines (padding, pipelining, kernels)",
        ),
    )
    return Result(rows, tuple(pictures))


EXPERIMENT: Final = Experiment(
    name="orca",
    title="Orca: iteration-level scheduling",
    paper="Yu et al., OSDI 2022",
    claim="36.9x the throughput of FasterTransformer at the same latency",
    setup=f"virtual time; GPT-3 175B on 16 A100 at the roofline ({_ITERATION / 1e6:.1f} ms an iteration + {_TOKEN / 1e6:.2f} ms a token), "
    f"{_REQUESTS} Poisson arrivals, at most {_SEATS} sequences, no padding on either side; "
    "same latency: a median latency a token of twice that of a request alone",
    takes="15 seconds",
    run=run,
)
