"""DistServe (Zhong et al., OSDI 2024): prompts and answers on GPUs of their own, by its authors' cost model and measurements in virtual time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from armillary.cluster.catalogue import link
from armillary.core.clock import VirtualClock
from armillary.core.trace import Trace
from armillary.core.units import MS, S
from armillary.models.graph.published import architecture
from armillary.plan.candidates import Candidate, Space, candidates
from armillary.plan.demand import Demand
from armillary.plan.disaggregation import Apart as Placed
from armillary.plan.disaggregation import disaggregate
from armillary.plan.objective import Objective
from armillary.reproduce import recorded
from armillary.reproduce.distserve_lines import OPT_13B, OPT_13B_X2, OPT_13B_X4, OPT_66B_X2, OPT_66B_X4, VLLM_13B, VLLM_13B_FIT, VLLM_66B_X4
from armillary.reproduce.prefill_first import PrefillFirst
from armillary.reproduce.registry import Experiment, Result, Row
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.fleet.queueing import first_token, first_token_pipelined, first_token_sharded
from armillary.serve.request import Request
from armillary.serve.schedule import SchedulerPolicy
from armillary.serve.simulation.disaggregated import Disaggregated, Side
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.serve.simulation.recorder import Recorder
from armillary.serve.simulation.recorder import Result as Times
from armillary.serve.simulation.scenario import answers_alone, prompts_alone
from armillary.serve.workload import Lengths, fixed, poisson, requests
from armillary.serve.workload.requests import Arrival, arrivals
from armillary.sim.batch import Batch
from armillary.sim.costs import Decoding, Linear

PREFILLS: Final = {128: 28.4, 512: 65.6, 1024: 118.1, 2048: 233.4}  # ms by tokens
DECODES: Final = {1: 20.3, 32: 31.4, 64: 42.9, 128: 65.4}  # ms by sequences that read 512 tokens each
ATTAINED: Final = 0.9
_COUNT: Final = 800  # requests of a simulation
_RATES: Final = tuple(0.1 * 1.06**step for step in range(94))  # requests/s, up to 23
_BLOCK: Final = 16
# As the authors served (`evaluation/2-benchmark-serving/2-start-api-server.py`).
_USED: Final = 0.95  # of a GPU's memory
_VLLM: Final = {"max_batch_tokens": 16384, "max_running": 1024}
_PREFILL: Final = {"max_batch_tokens": 8192, "max_running": 128}
_DECODE: Final = {"max_batch_tokens": 65536, "max_running": 1024}


@dataclass(frozen=True, slots=True)
class Case:
    """What is asked, and what 90 % of the requests shall feel, ns."""

    lengths: Lengths
    first_token: int
    per_token: int

    def coming(self, rate: float, count: int = _COUNT) -> Iterator[Request]:
        """Poisson, within OPT's context."""
        return requests(arrivals(poisson(rate, 7), self.lengths, count, 3, limit=2048))


SHAREGPT: Final = recorded.lengths("opt_13b_vllm_1rps")
FIGURE: Final = Case(fixed(512, 64), 400 * MS, 40 * MS)  # figure 1
CHAT: Final = Case(SHAREGPT, 250 * MS, 100 * MS)  # table 1, the chatbot of OPT-13B
CHAT_66B: Final = Case(SHAREGPT, 2500 * MS, 150 * MS)  # and of OPT-66B


@dataclass(frozen=True, slots=True)
class Apart:
    """Engines of each phase. `blocks` of an engine; `gpus` of all of them together."""

    prefill: Linear
    prefills: int
    prefill_blocks: int
    decode: Linear
    decodes: int
    decode_blocks: int
    gpus: int
    token_bytes: int

    def run(self, those: Iterator[Request]) -> tuple[Times, Disaggregated]:
        """Over NVLink; half of a prefill engine's memory is the buffer."""
        first = Side(self.prefill, config(self.prefill_blocks // 2, **_PREFILL), self.prefills)
        then = Side(self.decode, config(self.decode_blocks, **_DECODE), self.decodes)
        simulation = Disaggregated(first, then, link("nvlink-3"), self.token_bytes, self.prefill_blocks * _BLOCK // 2)
        return simulation.run(those), simulation

    def goodput(self, case: Case) -> float:
        """Requests a second and GPU."""
        return goodput(lambda rate: self.run(case.coming(rate * self.gpus))[0].attainment(case.first_token, case.per_token))


def token_bytes(model: str) -> int:
    """Of keys and values, 16 bits wide."""
    shape = architecture(model)
    return 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def blocks(model: str, gpus: int) -> int:
    """KV blocks that so many A100-80G have together beside the weights."""
    weights = 2 * {"opt-13b": 13e9, "opt-66b": 66e9}[model]
    return int((_USED * gpus * 80 * 2**30 - weights) // token_bytes(model) // _BLOCK)


def config(kv_blocks: int, **options: Any) -> EngineConfig:
    plain = {"policy": "vllm", "kv_blocks": kv_blocks, "block_size": _BLOCK, "max_queue": 1_000_000, "prefix_cache": "off"}
    return EngineConfig.model_validate({**plain, **options})


def together(those: Iterator[Request], cost: Linear, kv_blocks: int, policy: SchedulerPolicy | None = None) -> Times:
    """vLLM as it was: prompts first and whole, answers stand still meanwhile."""
    recorder, settled = Recorder(), config(kv_blocks, **_VLLM)
    executor = VirtualExecutor(VirtualClock(), cost)
    replay(VirtualEngine(executor, settled, policy=policy or PrefillFirst(), recorder=recorder, told=False), those)
    return recorder.result()


def decode_only(those: Iterator[Request], cost: Linear, kv_blocks: int) -> Times:
    """Answers alone."""
    recorder = Recorder()
    settled = config(kv_blocks, **_DECODE)
    replay(VirtualEngine(VirtualExecutor(VirtualClock(), cost), settled, recorder=recorder, told=False), answers_alone(those))
    return recorder.result()


def goodput(attained: Callable[[float], float]) -> float:
    """The highest rate, of a grid 6 % apart, at which 90 % of the requests are served as they should; by bisection."""
    low, high = -1, len(_RATES)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if attained(_RATES[middle]) >= ATTAINED else (low, middle)
    return _RATES[low] if low >= 0 else 0.0


def as_recorded(cost: Linear) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The recorded requests at their times by `cost`: ms to the first token, and a token after it (0 where there is none). [requests] each"""
    found = recorded.columns("opt_13b_vllm_1rps")
    asked = zip(found["arrival_s"], found["prompt"], found["answer"], strict=True)
    those = list(requests(Arrival(round(at * S), int(prompt), int(answer)) for at, prompt, answer in asked))
    together(iter(those), cost, blocks("opt-13b", 1))
    arrival, first, end = (np.array([getattr(one, name) for one in those]) for name in ("arrival", "first_token", "finished"))
    return (first - arrival) / MS, (end - first) / MS / np.maximum(1, found["answer"] - 1)


def placed(case: Case) -> Placed:
    """The pair of OPT-13B's instances that algorithm 2 finds on nodes of eight GPUs, by the authors' lines, and what it serves."""
    space = Space(("dgx-a100",), (1, 2, 4), (1,), ("vllm",), (_PREFILL["max_batch_tokens"],), (_DECODE["max_running"],))
    engine = EngineConfig.model_validate({"kv_dtype": "fp16", "max_queue": 1_000_000, "prefix_cache": "off"})
    lines, fitting = {1: OPT_13B, 2: OPT_13B_X2, 4: OPT_13B_X4}, []
    for one in candidates(architecture("opt-13b"), space, engine):
        assert isinstance(one, Candidate)
        fitting.append(replace(one, scenario=replace(one.scenario, cost=lines[one.devices])))
    demand, objective = Demand(case.lengths, seed=7), Objective(case.first_token, case.per_token, attainment=ATTAINED)
    found, _ = disaggregate(fitting, demand, objective, demand.moments(2048), rank="devices", tolerance=0.06)
    return next(one for one in found if one.algorithm == 2)


def mean_first_token(rate: float, service: int, count: int = 20_000) -> float:
    """s, of a prefill engine whose prompts all take `service` ns, simulated."""
    recorder = Recorder()
    cost = Linear("constant", service, 0, 0, Decoding(1, 0, 0))
    settled = config(64, policy="orca", max_running=1)
    executor = VirtualExecutor(VirtualClock(), cost)
    replay(VirtualEngine(executor, settled, recorder=recorder, told=False), requests(arrivals(poisson(rate, 1), fixed(8, 1), count)))
    return float(recorder.result().first_tokens.mean()) / S


def _closed_forms() -> Iterator[Row]:
    for tokens, ms in PREFILLS.items():
        ours = OPT_13B.iteration(Batch(((tokens, 0),), 0, 0, 1)) / MS
        yield Row(
            f"a prompt of {tokens:,} tokens", "ms", ms, "simdistserve, OPT-13B on an A100", ours, ms - 0.05, ms + 0.05, "its last digit"
        )
    for sequences, ms in DECODES.items():
        ours = OPT_13B.iteration(Batch((), sequences, 512 * sequences, sequences)) / MS
        yield Row(f"a decode of {sequences} x 512", "ms", ms, "simdistserve", ours, ms - 0.05, ms + 0.05, "its last digit")
    waits: dict[str, tuple[Callable[[float, float], float], tuple[float, float]]] = {
        "one GPU": (first_token, (0.1125, 0.3000)),
        "two stages": (first_token_pipelined, (0.1028, 0.1167)),
        "two GPUs a layer, 1.7 times as fast": (partial(first_token_sharded, speedup=1.7), (0.0627, 0.0850)),
    }
    for name, (formula, golden) in waits.items():
        for rate, seconds in zip((2.0, 8.0), golden, strict=True):
            yield Row(
                f"mean time to first token, prompts of 100 ms, {rate:g} a second, {name}", "s", seconds, "section 3.1, closed form",
                formula(0.1, rate), seconds - 5e-5, seconds + 5e-5, "its last digit",
            )  # fmt: skip
    expected = first_token(0.1, 5.0)
    yield Row(
        "the same on one GPU, 5 a second, simulated", "s", expected, "M/D/1", mean_first_token(5.0, 100 * MS),
        0.98 * expected, 1.02 * expected, "2 %: 20,000 arrivals",
    )  # fmt: skip


def _recorded() -> Iterator[Row]:
    """vLLM's requests as its users felt them, beside the authors' fits and beside these with the two corrections."""
    found = recorded.columns("opt_13b_vllm_1rps")
    source = "recorded by the authors: 100 requests of ShareGPT, one a second, OPT-13B in vLLM"
    others = np.maximum(0, found["answer"] - 1)
    theirs = found["ttft_ms"], found["tpot_ms"]
    for name, cost, share in (("DistServe's fit", OPT_13B, 0.3), ("vLLM's fit", VLLM_13B_FIT, 0.3), ("vLLM's, corrected", VLLM_13B, 0.03)):
        ours = as_recorded(cost)
        why = "3 %: two constants from these two means" if name.endswith("corrected") else "30 %: how far fits of iterations alone are off"
        means = [(float(first.mean()), float(other @ others / others.sum())) for first, other in (ours, theirs)]
        for what, mine, known in zip(("to the first token", "a token after it"), *means, strict=True):
            yield Row(f"mean time {what}, {name}", "ms", known, source, mine, known * (1 - share), known * (1 + share), why, after=True)
    errors = np.abs(np.concatenate(ours) / np.concatenate(theirs) - 1)
    yield Row(
        "error by request of both, median, corrected", "%", 0.0, source, 100 * float(np.median(errors)), 0.0, 10.0, "10 %", after=True
    )
    kept, known = (100 * float(((first <= 250) & (other <= 100)).mean()) for first, other in (ours, theirs))
    yield Row("requests within 250 and 100 ms, corrected", "%", known, source, kept, known - 5, known + 5, "5 points", after=True)


def run() -> Result:
    rows = [*_closed_forms(), *_recorded()]
    one, width = blocks("opt-13b", 1), token_bytes("opt-13b")
    first, per = FIGURE.first_token, FIGURE.per_token
    both = goodput(lambda rate: together(FIGURE.coming(rate), VLLM_13B, one).attainment(first, per))
    prompts = goodput(lambda rate: together(prompts_alone(FIGURE.coming(rate)), VLLM_13B, one).attainment(first))
    answers = goodput(lambda rate: decode_only(FIGURE.coming(rate), VLLM_13B, one).attainment(per_token=per))
    split = Apart(VLLM_13B, 2, one, VLLM_13B, 1, one, 3, width)
    parted = split.goodput(FIGURE)
    source, rough = "figure 1: 512 + 64 tokens, 90 % within 400 and 40 ms", "a factor of 2"
    for what, published, ours in (
        ("both phases on it", 1.6, both), ("prompts alone", 5.6, prompts), ("answers alone", 10.0, answers), ("2 for prompts and 1 for answers", 3.3, parted)
    ):  # fmt: skip
        rows.append(Row(f"goodput of a GPU, {what}", "1/s", published, source, ours, published / 2, published * 2, rough, after=True))
    rows.append(Row("apart over together", "x", 2.1, source, parted / both, 1.05, 4.2, rough, after=True))

    chat = goodput(lambda rate: together(CHAT.coming(rate), VLLM_13B, one).attainment(CHAT.first_token, CHAT.per_token))
    apart = Apart(OPT_13B_X2, 1, blocks("opt-13b", 2), OPT_13B, 1, one, 3, width).goodput(CHAT)
    pair = placed(CHAT)
    gpus = [side.candidate.devices for side in (pair.prefill, pair.decode)]
    assert pair.pair is not None
    fast = goodput(lambda rate: together(CHAT.coming(rate), OPT_13B, one).attainment(CHAT.first_token, CHAT.per_token))
    figure = "figure 8, OPT-13B, ShareGPT (4.6 in the authors' notebook)"
    rows += [
        Row("goodput a GPU over vLLM, prompts over 2 GPUs and answers on 1", "x", 4.6, figure, apart / chat, 2.3, 9.2, rough, after=True),
        Row(
            f"the same as our algorithm 2 places it: prompts on {gpus[0]}, answers on {gpus[1]}", "x", 4.6, figure, pair.pair / sum(gpus) / chat,
            2.3, 9.2, rough, after=True,
        ),
        Row(
            "the same over one engine that is as fast as DistServe's", "x", 4.6, f"{figure}; its vLLM is slower", apart / fast, 0.5, 4.6,
            "no more than published: no faster engine", after=True,
        ),
    ]  # fmt: skip
    large, width = blocks("opt-66b", 4), token_bytes("opt-66b")
    loose = CHAT_66B.first_token, CHAT_66B.per_token
    chat = goodput(lambda rate: together(CHAT_66B.coming(rate), VLLM_66B_X4, large).attainment(*loose)) / 4
    # Two stages of two GPUs hold two batches in turn: as two engines that share the memory of four.
    apart = Apart(OPT_66B_X4, 1, large, OPT_66B_X2, 2, large // 2, 8, width).goodput(CHAT_66B)
    rows.append(
        Row(
            "goodput a GPU over vLLM, OPT-66B: prompts over 4 GPUs, answers over 2 in 2 stages", "x", 2.75,
            "figure 8, OPT-66B, ShareGPT (2.75 in the authors' notebook)", apart / chat, 1.0, 5.5,
            "over 1: vLLM by its fit, uncorrected for want of a record", after=True,
        )
    )  # fmt: skip
    result, simulation = split.run(FIGURE.coming(3 * parted))
    several = int((result.answer > 1).sum())
    moved = len({move.request_id for move in simulation.moved}) / several if several == len(simulation.moved) else 0.0
    rows.append(Row("moves of keys and values, of those that needed one", "x", 1.0, "by construction: once each", moved, 1.0, 1.0, "exact"))
    trace = Trace("together")
    shown = VirtualEngine(VirtualExecutor(VirtualClock(), VLLM_13B), config(one, **_VLLM), policy=PrefillFirst(), trace=trace)
    replay(shown, FIGURE.coming(both, 12))
    return Result(tuple(rows), ((f"both on one GPU: the first 12 requests at {both:.2f} a second", trace),))


EXPERIMENT: Final = Experiment(
    name="distserve",
    title="DistServe: prefill and decode on GPUs of their own",
    paper="Zhong et al., OSDI 2024",
    claim="7.4x the requests of other systems (2.0x to 4.6x of vLLM for chatbots), or an SLO 12.6x as tight, for over 90 % of them",
    setup=f"closed forms; then virtual time on A100-80G, {_COUNT} Poisson requests a simulation, limits as the authors' servers had them. DistServe by the "
    "authors' fitted lines; vLLM (prompts first and whole, answers stand still) by their fit with two constants from 100 requests that they recorded. "
    "Chatbots: lengths of these requests, 250 ms to the first token and 100 ms a token (OPT-66B 2.5 s and 150 ms)",
    takes="35 seconds",
    run=run,
)
