"""Drafts beside the virtual engine's: passes, tokens a pass and iterations of the same requests, by an acceptance measured of a real run. Counts, no times.

    python bench/drafts_ahead.py [--answers 16] [--tokens 160]      # two minutes; a busy machine is no matter

SmolLM2 in int4 with n-gram drafts answers texts that repeat themselves and texts that do not. How often its drafts were right, and how often there were
any, is the only thing that the virtual engine is told, beside the costs of iterations that the real drafter came to believe in (they decide how many tokens
it asks for): once as one rate, once for each draft of a pass, once apart for passes that follow one that was right, once for each request by itself. `in halves`: the rates of every other request predict the rest.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from armillary.core.clock import VirtualClock
from armillary.models.load import load
from armillary.serve.config import EngineConfig
from armillary.serve.executors.virtual import VirtualExecutor
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.simulation.acceptance import Acceptance, Observed, measured
from armillary.serve.simulation.drafts import Drafting
from armillary.serve.simulation.engine import VirtualEngine, replay
from armillary.sim.costs import Decoding, Linear

RUNNING = 4
TOPICS = ("a lighthouse keeper and a storm", "the history of bread", "how bridges are built", "a letter to a friend", "the sea at night")


def texts(count: int) -> list[str]:
    found = []
    for number in range(count):
        if number % 2:
            found.append(f"Write a long text about {TOPICS[number // 2 % len(TOPICS)]}, part {number}.\n\n")
            continue
        records = [
            {"id": i + number, "name": f"item {i * 7 % 31}", "price": round(1.5 * i + number, 2), "tags": ["a", "b"]} for i in range(16)
        ]
        listing = json.dumps(records, indent=1)
        found.append(f"Here is a list of records:\n{listing}\nThe same list again:\n{listing[:120]}")
    return found


class ByRequest:
    """Each request's own rates."""

    def __init__(self, each: Mapping[str, Acceptance]) -> None:
        self._each = each

    def right(self, request: Request, position: int, place: int, seed: int, again: bool) -> bool:
        return self._each[request.id].right(request, position, place, seed, again)

    def proposed(self, request: Request, seed: int, again: bool) -> bool:
        return self._each[request.id].proposed(request, seed, again)


def copies(requests: Sequence[Request]) -> list[Request]:
    return [
        Request(request.id, request.prompt, replace(request.sampling, max_tokens=len(request.output), seed=None), arrival=0)
        for request in requests
    ]


def counts(requests: Sequence[Request], iterations: int) -> dict[str, float]:
    tokens = sum(len(request.output) - 1 for request in requests)
    accepted = sum(request.accepted for request in requests)
    return {
        "iterations": iterations, "drafted": sum(request.drafted for request in requests), "accepted": accepted,
        "tokens a pass": tokens / (tokens - accepted),
    }  # fmt: skip


def virtual(requests: Sequence[Request], config: EngineConfig, acceptance: Any, cost: tuple[float, float]) -> dict[str, float]:
    """The same requests in virtual time, whose iterations cost `cost` (fixed, a token) ns."""
    clock, again = VirtualClock(), copies(requests)
    line = Linear("as the drafter believes", cost[0], cost[1], 0, Decoding(cost[0], 0, cost[1]))
    engine = VirtualEngine(VirtualExecutor(clock, line), config, drafter=Drafting(acceptance).drafter(config, clock))
    replay(engine, again)
    return counts(again, engine.stats.iterations)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=160)
    options = parser.parse_args()
    loaded = load("smollm2")
    config = EngineConfig(quantize="int4", speculate="ngram", max_running=RUNNING, prefix_cache="off", kv_memory="400 MB")
    engine = build_engine(loaded, config)
    grammars: Any = engine.drafter  # drafts of grammars come first; nobody has one here
    adaptive = grammars._behind
    observed = grammars._behind = Observed(adaptive)
    sampling = SamplingParams(options.tokens, temperature=0.0, ignore_eos=True)
    requests = [Request(f"r{i}", tuple(loaded.tokenizer.encode(text)), sampling) for i, text in enumerate(texts(options.answers))]
    for request in requests:
        engine.submit(request)
    engine.run_until_idle()
    cost = adaptive._cost.fit()

    def rates(names: Sequence[str], places: int = 8) -> Acceptance:
        return measured([observed.passes.get(name, []) for name in names], places)

    names = [request.id for request in requests]
    whole = rates(names)
    found = {
        "real": counts(requests, engine.stats.iterations),
        "one rate": virtual(requests, engine.config, replace(rates(names, 1), again=None), cost),
        "by draft of a pass": virtual(requests, engine.config, replace(whole, again=None), cost),
        "apart where the pass before was right": virtual(requests, engine.config, whole, cost),
        "by request": virtual(requests, engine.config, ByRequest({name: rates([name]) for name in names}), cost),
    }
    # Half of each kind of text predicts the other half.
    known, other = names[0::4] + names[1::4], [request for request in requests if request.id in names[2::4] + names[3::4]]
    halves = {name: rates([one for one in known if int(one[1:]) % 2 == int(name[1:]) % 2]) for name in (request.id for request in other)}
    real = counts(other, 0)
    predicted = virtual(other, engine.config, ByRequest(halves), cost)
    print(
        f"acceptance measured: --acceptance {whole}; an iteration is believed to take {cost[0] / 1e6:.2f} ms + {cost[1] / 1e6:.3f} ms a token\n"
    )
    print("| | iterations | drafted | accepted | tokens a pass |\n|---|---:|---:|---:|---:|")
    for name, row in found.items():
        print(f"| {name} | {row['iterations']:,.0f} | {row['drafted']:,.0f} | {row['accepted']:,.0f} | {row['tokens a pass']:.3f} |")
    print(f"\nin halves, by kind of text: {real['tokens a pass']:.3f} tokens a pass, predicted {predicted['tokens a pass']:.3f}")


if __name__ == "__main__":
    main()
