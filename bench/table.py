"""The results of the serving bench as one Markdown table: ours, each peer at its best, the machine's bound, and the ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

OURS = "armillary"
Result = Mapping[str, Any]


def best(results: Sequence[Result], side: str, case: str) -> Result | None:
    """A side's fastest variant of a case."""
    found = [result for result in results if result["side"] == side and result["case"] == case]
    return max(found, key=lambda result: result["tokens_per_second"], default=None)


def rows(results: Sequence[Result], cases: Sequence[str], peers: Sequence[str], bounds: Mapping[str, float]) -> list[list[str]]:
    """A header and a row a case. Ratios are ours over theirs: above 1.00, ours is faster."""
    header = ["tokens/s", OURS, *peers, "fp32 bound here", *(f"ours / {peer}" for peer in peers), "ours / bound"]
    lines = [header]
    for case in cases:
        ours = best(results, OURS, case)
        own = ours["tokens_per_second"] if ours else None
        theirs = [best(results, peer, case) for peer in peers]
        speeds = [result["tokens_per_second"] if result else None for result in theirs]
        named = [_speed(speed, result) for speed, result in zip(speeds, theirs, strict=True)]
        ratios = [_ratio(own, speed) for speed in (*speeds, bounds[case])]
        lines.append([case, _speed(own), *named, _speed(bounds[case]), *ratios])
    return lines


def markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def agreement(results: Sequence[Result], cases: Sequence[str]) -> list[str]:
    """A line for each side and variant: how many of the tokens that it showed are ours, up to the first difference in a case."""
    ours = {case: best(results, OURS, case) for case in cases}
    lines = []
    for side, variant in sorted({(result["side"], result["variant"]) for result in results if result["side"] != OURS}):
        same = shown = 0
        for result in results:
            own = ours.get(result["case"])
            if (result["side"], result["variant"]) != (side, variant) or own is None:
                continue
            pairs = list(zip(result["tokens"], own["tokens"], strict=False))
            shown += len(pairs)
            same += next((i for i, (theirs, mine) in enumerate(pairs) if theirs != mine), len(pairs))
        lines.append(f"{side} ({variant}): {same} of {shown} greedy tokens equal ours before the first difference of a case")
    return lines


def _speed(speed: float | None, result: Result | None = None) -> str:
    if speed is None:
        return "-"
    variant = f" ({result['variant']})" if result and "," not in result["variant"] else ""
    return f"{speed:,.1f}{variant}" if speed < 100 else f"{speed:,.0f}{variant}"


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own and other else "-"
