"""What the GPU benches have in common: options, the roofline's table, and where results are written."""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import card
from cases import Case, bound

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "results"


@dataclass(frozen=True)
class Result:
    """Seconds of ours and of each peer (None: it does not take this case), and how far ours is from the exact result."""

    case: str
    ours: float
    peers: dict[str, float | None]
    error: float  # as a share of what is allowed


def main(title: str, about: str, cases: Sequence[Case], measure: Callable[[Case], Result], argv: Sequence[str] | None = None) -> int:
    """The whole bench: 0 when every case was measured and right, 2 where it cannot be."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the cases with their bytes and FLOPs; needs no GPU")
    parser.add_argument("--json", action="store_true", help="with --dry-run: as JSON")
    parser.add_argument("--cases", nargs="+", default=["*"], help="only cases whose name matches one, such as 'decode-*'")
    parser.add_argument("--publish", action="store_true", help=f"write bench/results/gpu_{title}.{{json,md}}")
    options = parser.parse_args(argv)
    chosen = [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in options.cases)]
    if not chosen:
        parser.error(f"no case is called {' or '.join(options.cases)}: {', '.join(case.name for case in cases)}")
    if options.dry_run:
        print(json.dumps([needs(case) for case in chosen], indent=1) if options.json else dry(chosen))
        return 0
    lacking = card.lacking()
    if lacking is not None:
        print(f"bench/gpu/{title}.py {lacking}", file=sys.stderr)
        return 2
    before = os.getloadavg()
    found = []
    for case in chosen:
        found.append(measure(case))
        print(f"{case.name}: {found[-1].ours * 1e6:,.1f} us", file=sys.stderr, flush=True)
    # Measured last: a card that has been working is as warm, and clocked as low, as it was for the cases.
    limits = card.limits()
    text = page(title, chosen, found, limits, before)
    print(text)
    if options.publish:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"gpu_{title}.md").write_text(text)
        record = {
            "card": card.about(),
            "limits": asdict(limits),
            "cases": [needs(c) for c in chosen],
            "results": [asdict(r) for r in found],
        }
        (RESULTS / f"gpu_{title}.json").write_text(json.dumps(record, indent=1) + "\n")
        print(f"published in bench/results/gpu_{title}.md and .json", file=sys.stderr)
    return 0


def needs(case: Case) -> dict[str, object]:
    return asdict(case) | {"bytes": case.bytes, "flops": case.flops}


def dry(cases: Sequence[Case]) -> str:
    rows = [(case.name, f"{case.bytes / 1e6:,.2f}", f"{case.flops / 1e9:,.3f}", f"{case.flops / case.bytes:,.1f}") for case in cases]
    return table(("case", "MB moved at least", "GFLOP", "FLOP a byte"), rows)


def page(title: str, cases: Sequence[Case], found: Sequence[Result], limits: card.Limits, before: tuple[float, ...]) -> str:
    peers = list(found[0].peers)
    head = (
        "case",
        "ours, us",
        "GB/s",
        "TFLOP/s",
        "of the bound",
        "error / allowed",
        *(f"{peer}, us" for peer in peers),
        *(f"{p} / ours" for p in peers),
    )
    rows = []
    for case, result in zip(cases, found, strict=True):
        times = [result.peers[peer] for peer in peers]
        rows.append(
            (
                case.name,
                f"{result.ours * 1e6:,.1f}",
                f"{case.bytes / result.ours / 1e9:,.0f}",
                f"{case.flops / result.ours / 1e12:,.2f}",
                f"{bound(case, limits.bandwidth, limits.flops) / result.ours:.0%}",
                f"{result.error:.2f}",
                *("-" if seconds is None else f"{seconds * 1e6:,.1f}" for seconds in times),
                *("-" if seconds is None else f"{seconds / result.ours:.2f}" for seconds in times),
            )
        )
    return "\n".join(
        (
            f"# {title.replace('_', ' ').capitalize()} on a GPU",
            "",
            f"{card.about()}. At most {limits.bandwidth / 1e9:,.0f} GB/s (a copy) and {limits.flops / 1e12:,.0f} TFLOP/s (an fp16 product"
            f" of 8192 squared), measured in this run. {time.strftime('%Y-%m-%d')}.",
            f"Load average {' '.join(f'{load:.2f}' for load in before)} before. Best of several, the second-level cache overwritten before each.",
            "",
            table(head, rows),
            "",
        )
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"| --- |{' ---: |' * (len(head) - 1)}"]
    return "\n".join((*lines, *(f"| {' | '.join(row)} |" for row in rows)))
