"""The results of the serving bench as Markdown tables: fp32 weights on all sides, and smaller weights on ours and llama.cpp's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Result = Mapping[str, Any]
Column = tuple[str, str]  # side, variant

NAMES: Mapping[Column, str] = {
    ("armillary", "fp32"): "Armillary",
    ("armillary", "torch fp32"): "Armillary, plain torch",
    ("vllm", "fp32"): "vLLM, compiled",
    ("transformers", "fp32"): "transformers",
    ("armillary", "fp16"): "Armillary fp16",
    ("armillary", "int8"): "Armillary int8",
    ("armillary", "int4"): "Armillary int4",
    **{("llama", name): f"llama.cpp {name}" for name in ("F16", "Q8_0", "Q4_0", "Q4_1")},
}
EXACT = tuple(column for column in NAMES if "fp32" in column[1])
SMALL = tuple(column for column in NAMES if "fp32" not in column[1])


def fp32(results: Sequence[Result], cases: Sequence[str], bounds: Mapping[str, float]) -> str:
    """A line a case, both of our backends beside each peer and the bound. Ratios are ours over theirs."""
    speeds = _speeds(results)
    columns = [column for column in EXACT if any((column, case) in speeds for case in cases)]
    ours = [column for column in columns if column[0] == "armillary"]
    theirs = [column for column in columns if column[0] != "armillary"]
    pairs = [(own, other) for other in theirs for own in ours]
    lines = [
        [
            "tokens/s, fp32",
            *(NAMES[column] for column in columns),
            "bound here",
            *(f"{_short(own)} / {other[0]}" for own, other in pairs),
            *(f"{_short(own)} / bound" for own in ours),
        ]
    ]
    for case in cases:
        found = {column: speeds.get((column, case)) for column in columns}
        bound = bounds[case]
        ratios = [_ratio(found[own], found[other]) for own, other in pairs] + [_ratio(found[own], bound) for own in ours]
        lines.append([case, *(_speed(found[column]) for column in columns), _speed(bound), *ratios])
    return markdown(lines)


def small(results: Sequence[Result], cases: Sequence[str]) -> str:
    """A line a case, every weight format below fp32; the ratio is our fastest over llama.cpp's fastest. "" when there is none."""
    speeds = _speeds(results)
    columns = [column for column in SMALL if any((column, case) in speeds for case in cases)]
    if not columns:
        return ""
    lines = [["tokens/s, smaller weights", *(NAMES[column] for column in columns), "best / best"]]
    for case in cases:
        found = {column: speeds.get((column, case)) for column in columns}
        best = {
            side: max((speed for (owner, _), speed in found.items() if owner == side and speed), default=None)
            for side in ("armillary", "llama")
        }
        lines.append([case, *(_speed(speed) for speed in found.values()), _ratio(best["armillary"], best["llama"])])
    return markdown(lines)


def markdown(lines: Sequence[Sequence[str]]) -> str:
    header, *body = lines
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *body))


def agreement(results: Sequence[Result]) -> list[str]:
    """A line for each side and variant: how many of the tokens that it showed are those of our fp32 side, up to a case's first difference."""
    reference = {result["case"]: result["tokens"] for result in results if (result["side"], result["variant"]) == ("armillary", "fp32")}
    lines = []
    for column, name in NAMES.items():
        same = shown = 0
        for result in results:
            if (result["side"], result["variant"]) == column and result["case"] in reference:
                pairs = list(zip(result["tokens"], reference[result["case"]], strict=False))
                shown += len(pairs)
                same += next((i for i, (theirs, mine) in enumerate(pairs) if theirs != mine), len(pairs))
        if shown and column != ("armillary", "fp32"):
            lines.append(f"{name}: {same} of {shown}")
    return lines


def _speeds(results: Sequence[Result]) -> dict[tuple[Column, str], float]:
    return {((result["side"], result["variant"]), result["case"]): result["tokens_per_second"] for result in results}


def _short(column: Column) -> str:
    return "torch" if column[1].startswith("torch") else "ours"


def _speed(speed: float | None) -> str:
    if speed is None:
        return "-"
    return f"{speed:,.1f}" if speed < 100 else f"{speed:,.0f}"


def _ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own and other else "-"
