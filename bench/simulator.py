"""How fast virtual time passes: Vidur's setup stepped and leapt, the start, a whole trace, the event core, clusters of thousands of replicas.

    python bench/simulator.py [--publish]        (wants a quiet machine; one core; eight minutes, of which the clusters take seven)
    python bench/simulator.py --whole            (all requests of the cluster, however long that takes)
    python bench/simulator.py --replicas 100 --requests 20000 --force

`--trace FILE` replays a CSV of arrived_at, num_prefill_tokens, num_decode_tokens in place of the workload with the conversation trace's lengths.
"""

from __future__ import annotations

import argparse
import gc
import os
import resource
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from quiet import quiet

from armillary.cluster.machine import describe
from armillary.reproduce import vidur
from armillary.serve.request import Request
from armillary.serve.simulation.scenario import Run
from armillary.serve.workload import requests
from armillary.serve.workload.trace_file import Recorded
from armillary.sim.events import EventQueue

STEPPED, LEAPT = 2000, 8000  # requests
EVENTS, PENDING = 1_000_000, 10_000
MANY, EACH = 10_000, 10  # replicas, requests of each
SECONDS = 400.0  # after which the cluster takes no further requests


def peak() -> float:
    """MB of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def speed(count: int, *, leaps: bool) -> float:
    """Simulated requests a second, the best of three runs, each of which makes its cost model anew."""
    walls = []
    for _ in range(3):
        gc.collect()
        walls.append(vidur.scenario(leaps=leaps).run(vidur.coming(count)).wall)
    return count / min(walls)


def events() -> float:
    """Events a second, the best of three: each that happens is followed by another, so that `PENDING` wait at any time."""
    walls = []
    for _ in range(3):
        queue: EventQueue[int] = EventQueue()
        for number in range(PENDING):
            queue.at(number * 7919 % 100_003, number)
        began = time.perf_counter()
        for _ in range(EVENTS):
            happened = queue.pop()
            assert happened is not None
            queue.after(1 + happened * 7919 % 100_003, happened)
        walls.append(time.perf_counter() - began)
    return EVENTS / min(walls)


def trace(path: Path | None) -> tuple[int, Iterator[Request]]:
    """The whole trace, or as many requests of its lengths at 2 a second."""
    if path is None:
        return vidur.WHOLE, vidur.coming(vidur.WHOLE)
    coming = [one for one in Recorded(path) if one.prompt + one.answer <= 4096]
    return len(coming), requests(iter(coming))


def cluster(replicas: int, count: int, rate: float, seconds: float) -> tuple[int, float, float, Run]:
    """Requests that came within `seconds`, s that it took to make the replicas, s to serve all those requests, and what came of them."""
    began = time.perf_counter()
    one, came, until = vidur.scenario(replicas), [0], [0.0]

    def within() -> Iterator[Request]:
        until[0] = time.perf_counter()
        for request in vidur.coming(count, rate * replicas):
            if time.perf_counter() - until[0] > seconds:
                return
            came[0] += 1
            yield request

    run = one.run(within())
    return came[0], until[0] - began, run.wall, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=vidur.RATE, help="requests a second and replica of the clusters")
    parser.add_argument("--whole", action="store_true", help=f"all requests of the cluster, not only those of its first {SECONDS:g} s")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--publish", action="store_true", help="write bench/results/simulator.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    lines = ["| | ours | Vidur | bar | met |", "|---|---:|---:|---:|---|"]

    def told(what: str, ours: str, theirs: str, bar: str, met: bool | None) -> None:
        lines.append(f"| {what} | {ours} | {theirs} | {bar} | {'-' if met is None else 'yes' if met else 'no'} |")
        print(lines[-1], flush=True)

    for name, requested, leaps, times in (
        ("every iteration stepped", STEPPED, False, 8),
        ("iterations that repeat leapt over", LEAPT, True, 50),
    ):
        rate = speed(requested, leaps=leaps)
        ratio = rate / vidur.PEER
        told(f"requests simulated a second, {name}", f"{rate:,.0f} ({ratio:.1f}x)", f"{vidur.PEER:g}", f"{times}x", ratio >= times)
    start = min(vidur.start() for _ in range(3))
    told("start", f"{start:.2f} s", f"{vidur.PEER_START:g} s", "2 s", start <= 2)
    count, coming = trace(options.trace)
    wall = vidur.scenario().run(coming).wall
    of = "the trace" if options.trace else "its lengths"
    told(f"{count:,} requests, {of}", f"{wall:.1f} s", f"{count / vidur.PEER:,.0f} s", "10 s", wall <= 10)
    rate = events()
    told(f"events a second, {PENDING:,} waiting", f"{rate:,.0f}", "-", "500,000", rate >= 500_000)
    memory = [f"{peak():,.0f} MB at most with one replica"]

    came, made, wall, run = cluster(options.replicas, options.requests, options.rate, float("inf") if options.whole else SECONDS)
    minutes = wall / 60 * options.requests / came
    rest = "" if came == options.requests else f", as the {came:,} of {SECONDS:g} s have it"
    hours = f"{options.requests / vidur.PEER / 3600:.1f} h"
    told(
        f"{options.replicas:,} replicas, {options.requests:,} requests, {options.rate:g} a second and replica",
        f"{minutes:.1f} min ({came / wall:,.0f} a second{rest})", hours, "10 min", minutes <= 10,
    )  # fmt: skip
    memory.append(
        f"{peak():,.0f} MB with {options.replicas:,}, whose {run.stats.iterations:,} iterations keep {len(run.result.gaps):,} lengths of gaps between tokens"
    )
    many = MANY * EACH
    came, made, wall, run = cluster(MANY, many, options.rate, SECONDS)
    told(f"{MANY:,} replicas, {came:,} requests", f"{made:.1f} s to make them, {wall:.0f} s ({came / wall:,.0f} a second)", "-", "-", None)
    memory.append(f"{peak():,.0f} MB with {MANY:,}")
    text = (
        f"# Virtual time\n\n{describe().cpu}, one core, best of three but for the trace and the clusters. {vidur.EXPERIMENT.setup}. Vidur measured on a machine of two cores as "
        f"this: its linear predictor, {vidur.PEER:g} requests a second, hours at that rate for what it was not run on.\n`python bench/simulator.py`, {datetime.now(UTC):%Y-%m-%d}. "
        f"Load average {before:.2f} before, {os.getloadavg()[0]:.2f} after (the bench's own process included).\n\n"
        + "\n".join(lines)
        + f"\n\nMemory: {'; '.join(memory)}. A request that has ended leaves 64 bytes.\n"
    )
    print(f"\n{text}")
    if options.publish:
        (Path(__file__).parent / "results" / "simulator.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
