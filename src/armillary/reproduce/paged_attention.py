"""PagedAttention (Kwon et al., SOSP 2023): KV blocks taken as they are needed against memory reserved ahead, in virtual time."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import repeat
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.cluster.cluster import cluster
from armillary.core.clock import VirtualClock
from armillary.core.trace import Trace
from armillary.core.units import S
from armillary.models.graph.cost import Deployment
from armillary.models.graph.layout import Layout
from armillary.models.graph.precision import Precision
from armillary.models.graph.published import architecture
from armillary.reproduce.prefill_first import PrefillFirst
from armillary.reproduce.registry import Experiment, Result, Row
from armillary.reproduce.reserved import Reserved
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.request import Request
from armillary.serve.schedule import Plan
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.simulation.recorder import Result as Times
from armillary.serve.workload import poisson, requests
from armillary.serve.workload.requests import Arrival
from armillary.sim.costs.roofline import Roofline

# As published (table 1, sections 3 and 6.1), written down before the first run.
SLOTS: Final = 12 * 2**30 // (2 * 40 * 5120 * 2)  # tokens: 12 GB beside OPT-13B on an A100 of 40 GB, 15.7k
CONTEXT: Final = 2048
_BLOCK: Final = 16
_SEATS: Final = 256  # vLLM's
_BUDGET: Final = 2560  # vLLM's, tokens of prompts in an iteration
SHAREGPT: Final = (161.31, 337.99)  # figure 11: means of prompts and answers
ALPACA: Final = (19.31, 58.45)
_SPREAD: Final = 1.0  # of a length's logarithm; the paper has histograms only
_SECONDS: Final = 600  # of arrivals; the paper's traces last an hour
_LATENCY: Final = 0.5  # s a token: the middle of figure 12's axis


@dataclass(frozen=True, slots=True)
class Served:
    """What a run came to: mean s a token of whole requests; sequences that ran, on average over the later part of the arrivals."""

    latency: float
    running: float


class Held(Recorder):
    """How many of the cache's slots hold a token's keys and values, on average over time while somebody waits."""

    def __init__(self, those: Sequence[Request]) -> None:
        super().__init__()
        self.engine: VirtualEngine | None = None
        self._those, self._time, self._sum = those, 0, 0.0

    def waited(self, plan: Plan, ends: NDArray[np.int64]) -> None:
        assert self.engine is not None
        if self.engine.queued:
            holding = [request.computed for request in self._those if request.blocks]
            duration = int(ends[-1]) - self.engine.virtual_clock.now()
            self._time += duration
            self._sum += duration * (sum(holding) + len(plan.requests) * (len(ends) - 1) / 2)
        super().waited(plan, ends)

    @property
    def share(self) -> float:
        """Percent."""
        return 100 * self._sum / self._time / SLOTS


@cache
def lengths(means: tuple[float, float], count: int) -> list[tuple[int, int]]:
    """(prompt, answer) tokens: log-normal, within the context; both are scaled until what is left has the `means`."""
    scale = list(means)
    for _ in range(8):
        draw, found = random.Random(4), list[tuple[int, int]]()
        while len(found) < 4096:
            prompt, answer = (max(4, round(mean * math.exp(draw.gauss(0, _SPREAD) - _SPREAD**2 / 2))) for mean in scale)
            if prompt + answer <= CONTEXT:
                found.append((prompt, answer))
        scale = [mean * wanted / float(np.mean(drawn)) for mean, wanted, drawn in zip(scale, means, zip(*found, strict=True), strict=True)]
    return (found * (count // len(found) + 1))[:count]


@cache
def cost() -> Roofline:
    """OPT-13B in fp16 on one A100 of 40 GB."""
    return Deployment(architecture("opt-13b"), cluster("a100-40g"), Layout(), Precision()).roofline()


def workload(means: tuple[float, float], rate: float | None, count: int) -> Iterator[Request]:
    """Poisson, `rate` a second; None: all of them at once. The same lengths at every rate."""
    times = poisson(rate, 2) if rate is not None else repeat(0)
    return requests(Arrival(at, prompt, answer) for at, (prompt, answer) in zip(times, lengths(means, count), strict=False))


def serve(system: str, those: Iterable[Request], recorder: Recorder | None = None, trace: Trace | None = None) -> Times:
    """vLLM's blocks as they are needed (prompts first, as it was then), or Orca with what `system` reserves."""
    paged = system == "vllm"
    plain = {"policy": "vllm", "block_size": _BLOCK, "prefix_cache": "off", "max_queue": 1_000_000, "max_running": _SEATS}
    own = {"kv_blocks": SLOTS // _BLOCK, "max_batch_tokens": _BUDGET} if paged else {"kv_blocks": 1 << 16, "max_batch_tokens": 1 << 20}
    config, policy = EngineConfig.model_validate(plain | own), PrefillFirst() if paged else Reserved(system, SLOTS, CONTEXT)
    recorder, executor = Recorder() if recorder is None else recorder, VirtualExecutor(VirtualClock(), cost())
    engine = VirtualEngine(executor, config, policy=policy, recorder=recorder, told=trace is not None, trace=trace)
    if isinstance(recorder, Held):
        recorder.engine = engine
    replay(engine, those)
    return recorder.result()


def held(system: str, count: int = 600) -> float:
    """Percent of the slots that hold tokens when all requests are there at once, until the last is admitted."""
    those = list(workload(SHAREGPT, None, count))
    recorder = Held(those)
    serve(system, those, recorder)
    return recorder.share


def seen(result: Times) -> Served:
    """Of a run at a rate."""
    at = np.linspace(0.3, 1.0, 400)[:, None] * result.arrival.max()
    runs = ((result.first_scheduled <= at) & (at < result.finished)).sum(axis=1)
    return Served(float(np.mean((result.finished - result.arrival) / result.answer)) / S, float(runs.mean()))


def sustained(served: Callable[[float], Served]) -> float:
    """The highest rate (to 3 %) at which requests take `_LATENCY` s a token on average."""
    low, high = 0.05, 0.1
    while served(high).latency <= _LATENCY:
        low, high = high, 2 * high
    while high > 1.03 * low:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if served(middle).latency <= _LATENCY else (low, middle)
    return low


def run() -> Result:
    names = {
        "max": "reserved for the context",
        "pow2": "reserved for the next power of two",
        "oracle": "reserved for the true length",
        "vllm": "in blocks of 16 as needed",
    }
    rows = [
        Row(
            f"memory that holds tokens, {names[system]}",
            "%",
            share,
            "figure 2",
            held(system),
            share / 1.5,
            min(98.0, share * 1.5),
            "a half",
        )
        for system, share in (("max", 20.4), ("pow2", 26.8), ("oracle", 38.2), ("vllm", 96.3))
    ]
    for data, means, rate, known in (
        ("ShareGPT", SHAREGPT, 2.0, {"max": 7.0, "oracle": 13.62, "vllm": 30.42}),
        ("Alpaca", ALPACA, 30.0, {"max": 7.0, "oracle": 72.75, "vllm": 132.44}),
    ):
        for system, batch in known.items():
            found = seen(serve(system, workload(means, rate, round(rate * 120)))).running
            name = f"sequences that run, {data} at {rate:g} a second, {names[system]}"
            rows.append(Row(name, "", batch, "figure 13", found, batch / 2, batch * 2, "a factor of 2"))

    def capacity(system: str) -> float:
        return sustained(lambda rate: seen(serve(system, workload(SHAREGPT, rate, round(rate * _SECONDS)))))

    rates = {system: capacity(system) for system in ("oracle", "max", "vllm")}
    for system, low, high in (("oracle", 1.7, 2.7), ("max", 2.7, 8.0)):
        name = f"rate: in blocks over {names[system]} ({rates['vllm']:.2f} a second over {rates[system]:.2f})"
        source = f"section 6.2: {low}x to {high}x over models"
        rows.append(Row(name, "x", low, source, rates["vllm"] / rates[system], low, high, "the published range"))
    pictures = []
    for system in ("max", "vllm"):
        trace = Trace(system)
        serve(system, workload(SHAREGPT, 2 * rates["vllm"], 24), trace=trace)
        pictures.append((f"{names[system]}: 24 requests at {2 * rates['vllm']:.1f} a second", trace))
    return Result(tuple(rows), tuple(pictures))


EXPERIMENT: Final = Experiment(
    name="paged-attention",
    title="PagedAttention: KV blocks as they are needed",
    paper="Kwon et al., SOSP 2023",
    claim="2-4x the throughput of FasterTransformer and Orca at the same latency",
    setup=f"virtual time, fixed before the first run: OPT-13B on one A100 of 40 GB at the roofline, {SLOTS:,} tokens of KV cache; lengths log-normal with the "
    "paper's means of ShareGPT and Alpaca (it has histograms only), Poisson arrivals for 10 minutes (the paper's for an hour). Orca reserves in one piece from "
    f"a buddy allocator; vLLM runs prompts first. Rate: at which requests take {_LATENCY} s a token on average. Memory: all requests there at once",
    takes="25 seconds",
    run=run,
)
