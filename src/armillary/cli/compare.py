"""`armillary compare`: what a simulation said beside what happened."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.serve.simulation.comparison import Comparison, Share

SHOWN = 4  # sequences of an iteration in which schedules differ


def compare(
    real: Annotated[Path, Parameter(help="A trace.json of a run.")],
    virtual: Annotated[Path, Parameter(help="A trace.json of the same requests: simulated, or of another run.")],
    /,
    *,
    each: Annotated[bool, Parameter(negative=(), show_default=False, help="One line a request, too.")] = False,
    json: Json = False,
) -> None:
    """Times to first token, times a token and makespans of two traces of the same requests, and whether their schedules are the same."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.trace import Trace
    from armillary.core.units import format_duration
    from armillary.serve.simulation.comparison import compare

    found = compare(Trace.load(real), Trace.load(virtual))
    if json:
        print_json(_plain(found))
        return
    if each:
        rows = []
        for name, (one, other) in found.requests.items():
            tpots = ["-" if tpot is None else format_duration(tpot) for tpot in (one.tpot, other.tpot)]
            rows.append((name, one.tokens, format_duration(one.ttft), format_duration(other.ttft), *tpots))
        table(("request", "tokens", "TTFT", "predicted", "TPOT", "predicted"), rows)
        print()
    table(
        (f"{len(found.requests)} requests", "median error", "p99 error", "of the median", "of the p99", "bias"),
        [
            (name, f"{off.median:.1%}", f"{off.p99:.1%}", f"{off.of_median:.1%}", f"{off.of_p99:.1%}", f"{off.bias:+.1%}")
            for name, off in (("TTFT", found.ttft), ("TPOT", found.tpot))
        ],
    )
    before, after = (format_duration(ns) for ns in found.makespans)
    print(f"\nmakespan {before}, predicted {after}: {found.makespan_error:.1%} off")
    if found.only:
        print(f"{len(found.only)} requests are in one trace only: {', '.join(found.only[:5])}{' ...' if len(found.only) > 5 else ''}")
    if (parts := found.difference) is None:
        print(f"schedules identical: {found.iterations[0]:,} iterations")
    else:
        print(
            f"schedules of {found.iterations[0]:,} and {found.iterations[1]:,} iterations, the same up to iteration {parts.iteration:,}:\n"
            f"  real     {_words(parts.real)}\n  virtual  {_words(parts.virtual)}"
        )


def _words(shares: tuple[Share, ...]) -> str:
    if not shares:
        return "has ended"
    shown = ", ".join(f"{name}: {reason} {tokens}" for name, reason, tokens in shares[:SHOWN])
    return shown + (f" and {len(shares) - SHOWN} more" if len(shares) > SHOWN else "")


def _plain(found: Comparison) -> dict[str, object]:
    return {
        "requests": {
            name: [{"arrival": t.arrival, "ttft": t.ttft, "tpot": t.tpot, "tokens": t.tokens} for t in pair]
            for name, pair in found.requests.items()
        },
        "only": found.only,
        "iterations": found.iterations,
        "makespans": found.makespans,
        "makespan_error": found.makespan_error,
        "ttft": asdict(found.ttft),
        "tpot": asdict(found.tpot),
        "difference": None if found.difference is None else asdict(found.difference),
    }
