"""How fast virtual time passes: Vidur's setup stepped and leapt, the start, a whole trace, and a cluster of a thousand replicas.

    python bench/simulator.py [--publish]        (wants a quiet machine; one core; the cluster takes most of the time)
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
from armillary.serve.workload import requests
from armillary.serve.workload.trace_file import Recorded

STEPPED, LEAPT = 2000, 8000


def peak() -> float:
    """MB of this process at most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def best(count: int, *, leaps: bool) -> float:
    """Simulated requests a second, of three runs."""
    gc.collect()
    return vidur.speed(count, leaps=leaps, times=3)[0]


def trace(path: Path | None) -> tuple[int, Iterator[Request]]:
    """The whole trace, or as many requests of its lengths at 2 a second."""
    if path is None:
        return vidur.WHOLE, vidur.coming(vidur.WHOLE)
    coming = [one for one in Recorded(path) if one.prompt + one.answer <= 4096]
    return len(coming), requests(iter(coming))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rate", type=float, default=vidur.RATE, help="requests a second and replica of the cluster")
    parser.add_argument("--trace", type=Path)
    parser.add_argument("--publish", action="store_true", help="write bench/results/simulator.md")
    parser.add_argument("--force", action="store_true", help="measure although the machine is not quiet")
    options = parser.parse_args()
    before = os.getloadavg()[0]
    if not quiet(force=options.force):
        return 2
    lines = ["| | ours | Vidur | bar | met |", "|---|---:|---:|---:|---|"]

    def told(what: str, ours: str, theirs: str, bar: str, met: bool) -> None:
        lines.append(f"| {what} | {ours} | {theirs} | {bar} | {'yes' if met else 'no'} |")
        print(lines[-1], flush=True)

    for name, count, leaps, times in (
        ("every iteration stepped", STEPPED, False, 8),
        ("iterations that repeat leapt over", LEAPT, True, 50),
    ):
        speed = best(count, leaps=leaps)
        told(
            f"requests simulated a second, {name}",
            f"{speed:,.0f} ({speed / vidur.PEER:.0f}x)",
            f"{vidur.PEER:g}",
            f"{times}x",
            speed >= times * vidur.PEER,
        )
    start = min(vidur.start() for _ in range(3))
    told("start", f"{start:.2f} s", f"{vidur.PEER_START:g} s", "2 s", start <= 2)
    count, coming = trace(options.trace)
    wall = vidur.scenario().run(coming).wall
    told(
        f"{count:,} requests, {'the trace' if options.trace else 'its lengths'}",
        f"{wall:.1f} s",
        f"{count / vidur.PEER:,.0f} s",
        "10 s",
        wall <= 10,
    )
    small = peak()
    began = time.perf_counter()
    run = vidur.scenario(options.replicas).run(vidur.coming(options.requests, options.rate * options.replicas))
    wall = time.perf_counter() - began
    told(
        f"{options.replicas:,} replicas, {options.requests:,} requests, {options.rate:g} a second and replica",
        f"{wall / 60:.1f} min ({options.requests / wall:,.0f} a second)",
        f"{options.requests / vidur.PEER / 3600:.1f} h",
        "10 min",
        wall <= 600,
    )
    text = (
        f"# Virtual time\n\n{describe().cpu}, one core, best of three but for the cluster. {vidur.EXPERIMENT.setup}. Vidur measured on a machine of two cores as this: its linear "
        f"predictor, {vidur.PEER:g} requests a second, hours at that rate for what it was not run on.\n`python bench/simulator.py`, {datetime.now(UTC):%Y-%m-%d}. Load average "
        f"{before:.2f} before, {os.getloadavg()[0]:.2f} after.\n\n"
        + "\n".join(lines)
        + f"\n\nMemory: {small:,.0f} MB at most with one replica, {peak():,.0f} MB with the "
        f"cluster, whose {run.stats.iterations:,} iterations keep {len(run.result.gaps):,} lengths of gaps between tokens.\n"
    )
    print(f"\n{text}")
    if options.publish:
        (Path(__file__).parent / "results" / "simulator.md").write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
