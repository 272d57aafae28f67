"""What processes between the API and the engine cost, and what prefill apart from decode buys, in one run.

    python bench/replicas.py [--force] [--case router|split|failover]      # wants a quiet machine; two minutes

router: eight streams of one engine in this process, and of one replica behind the router: time between tokens.
split: a 1,500-token prompt arrives amid eight decodes, on one engine of two threads (two policies) and on a prefill and a decode worker of one each.
failover: eight streams on two replicas, one of which is killed: the longest gap that a reader sees.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from cases import TEXT
from quiet import quiet

from armillary.core.trace_summary import percentile
from armillary.models.load import LoadedModel, load
from armillary.serve.config import EngineConfig
from armillary.serve.fleet.build import build_fleet
from armillary.serve.fleet.config import FleetConfig
from armillary.serve.latency import TokenTimes
from armillary.serve.llm import build_engine
from armillary.serve.request import Request, SamplingParams
from armillary.serve.surface import Serving

STREAMS, PROMPT, LONG, TOKENS = 8, 128, 1500, 120
GREEDY = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=["router", "split", "failover"], action="append", help="only this one; may be repeated")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    loaded = load("smollm2")
    tokens = loaded.tokenizer.encode(TEXT.read_text(), special=False)
    cases: dict[str, Callable[[LoadedModel, list[int]], list[dict[str, Any]]]] = {"router": router, "split": split, "failover": failover}
    rows = [row for name in options.case or cases for row in cases[name](loaded, tokens)]
    print(f"Load {before:.2f} before, {os.getloadavg()[0]:.2f} after (the bench's own threads included).\n\n{table(rows)}")
    return 0


def router(loaded: LoadedModel, tokens: list[int]) -> list[dict[str, Any]]:
    config, one = _config(threads=2), FleetConfig(replicas=1)
    return [
        _measured("router", name, make(), tokens)
        for name, make in (
            ("one engine", lambda: build_engine(loaded, config, keep_weights=True)),
            ("one replica behind the router", lambda: build_fleet(loaded, config, one)),
        )
    ]


def split(loaded: LoadedModel, tokens: list[int]) -> list[dict[str, Any]]:
    workers = FleetConfig(prefill_workers=1, decode_workers=1)
    sides: list[tuple[str, Callable[[], Serving]]] = [
        (f"one engine, {policy}", lambda policy=policy: build_engine(loaded, _config(threads=2, policy=policy), keep_weights=True))
        for policy in ("vllm", "sarathi")
    ]
    sides.append(("1 prefill + 1 decode worker", lambda: build_fleet(loaded, _config(threads=2), workers)))
    return [_measured("split", name, make(), tokens, long=True) for name, make in sides]


def failover(loaded: LoadedModel, tokens: list[int]) -> list[dict[str, Any]]:
    def kill(serving: Serving) -> None:
        replicas = serving.snapshot()["features"]["fleet"]["replicas"]
        os.kill(max(replicas, key=lambda replica: replica["running"])["pid"], signal.SIGKILL)

    fleet = build_fleet(loaded, _config(threads=2), FleetConfig(replicas=2, router="round-robin"))
    return [_measured("failover", "2 replicas, one killed", fleet, tokens, midway=kill)]


def _config(**options: Any) -> EngineConfig:
    return EngineConfig(**{"kv_memory": 1_000_000_000, "prefix_cache": "off", "max_batch_tokens": 512, **options})


def _measured(
    case: str, name: str, serving: Serving, tokens: list[int], *, long: bool = False, midway: Callable[[Serving], None] | None = None
) -> dict[str, Any]:
    """Eight streams, and what happens when each has a third of its tokens."""
    print(f"{case}: {name} ...", file=sys.stderr, flush=True)
    serving.start()
    try:
        _run(serving, [Request(f"warm {i}", tuple(tokens[i : i + PROMPT]), SamplingParams(max_tokens=4)) for i in range(STREAMS)])
        times = [TokenTimes() for _ in range(STREAMS)]
        streams = [Request(f"stream {i}", tuple(tokens[PROMPT * i : PROMPT * (i + 1)]), GREEDY, on_event=times[i]) for i in range(STREAMS)]
        for request in streams:
            serving.submit(request)
        while any(len(one.times) < TOKENS // 3 for one in times):
            time.sleep(0.005)
        late = Request("long", tuple(tokens[-LONG:]), SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True))
        if long:
            serving.submit(late)
        if midway is not None:
            midway(serving)
        serving.run_until_idle()
        gaps = sorted(after - first for one in times for first, after in zip(one.times, one.times[1:], strict=False))
        fleet = serving.snapshot()["features"].get("fleet", {})
    finally:
        serving.stop()
    assert all(len(request.output) == TOKENS for request in streams)
    return {
        "case": case,
        "name": name,
        "gaps_ms": {str(percent): percentile(gaps, percent) / 1e6 for percent in (50, 99, 100)},
        "long_first_token_ms": (late.first_token - late.arrival) / 1e6 if late.first_token and late.arrival is not None else None,
        "tokens": [request.output for request in streams],
        "transferred_bytes": fleet.get("transferred_bytes", 0),
        "moved": fleet.get("moved", 0),
    }


def _run(serving: Serving, requests: list[Request]) -> None:
    for request in requests:
        serving.submit(request)
    serving.run_until_idle()


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        f"{STREAMS} streams of {TOKENS} tokens after prompts of {PROMPT}, 2 threads in all, fp32.",
        "",
        "| case | | between tokens, median | p99 | longest | first token of the long prompt | moved between workers | continued elsewhere |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        gaps, first = row["gaps_ms"], row["long_first_token_ms"]
        lines.append(
            f"| {row['case']} | {row['name']} | {gaps['50']:.1f} ms | {gaps['99']:.1f} ms | {gaps['100']:,.0f} ms "
            f"| {'' if first is None else f'{first:,.0f} ms'} | {row['transferred_bytes'] / 1e6:,.0f} MB | {row['moved']} |"
        )
    same = all(row["tokens"] == rows[0]["tokens"] for row in rows)
    lines += ["", f"The tokens of all rows are {'the same' if same else 'NOT the same'}."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
