"""The results of the serving bench as Markdown tables: fp32 weights on all sides, smaller weights on ours and llama.cpp's, ours beside the machine's limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from limits import Bound
from peers.workload import Case

Result = Mapping[str, Any]
Column = tuple[str, str]  # side, variant

FORMATS = ("F16", "Q8_0", "Q4_0", "Q4_1")
NAMES: Mapping[Column, str] = {
    ("armillary", "fp32"): "Armillary",
    ("armillary", "torch fp32"): "Armillary, plain torch",
    ("vllm", "fp32"): "vLLM, compiled",
    ("transformers", "fp32"): "transformers",
    ("armillary", "fp16"): "Armillary fp16",
    ("armillary", "int8"): "Armillary int8",
    ("armillary", "int4"): "Armillary int4",
    **{("llama", name): f"llama.cpp {name}" for name in FORMATS},
    **{("llama_server", name): f"llama.cpp's server {name}" for name in FORMATS},
}
EXACT = tuple(column for column in NAMES if "fp32" in column[1])
SMALL = tuple(column for column in NAMES if "fp32" not in column[1] and column[0] != "llama_server")


def fp32(results: Sequence[Result], cases: Sequence[Case]) -> str:
    """A line a case, both of our backends beside each peer. Ratios are ours over theirs. "" when there is none."""
    speeds = _speeds(results)
    columns = [column for column in EXACT if any((column, case.name) in speeds for case in cases)]
    if not columns:
        return ""
    ours = [column for column in columns if column[0] == "armillary"]
    pairs = [(own, other) for other in columns if other[0] != "armillary" for own in ours]
    lines = [
        ["tokens/s, fp32", *(NAMES[column] for column in columns), *(f"{_short(own)} / {other[0]}" for own, other in pairs)],
    ]
    for case in cases:
        found = {column: speeds.get((column, case.name)) for column in columns}
        lines.append([case.name, *(speed(found[column]) for column in columns), *(ratio(found[own], found[other]) for own, other in pairs)])
    return markdown(lines)


def small(results: Sequence[Result], cases: Sequence[Case]) -> str:
    """A line a case, every weight format below fp32; the ratio is our fastest over llama.cpp's fastest. "" when there is none."""
    speeds = _speeds(results)
    cases = [case for case in cases if case.kind != "offline"]
    columns = [column for column in SMALL if any((column, case.name) in speeds for case in cases)]
    if not columns:
        return ""
    lines = [["tokens/s, smaller weights", *(NAMES[column] for column in columns), "best / best"]]
    for case in cases:
        found = {column: speeds.get((column, case.name)) for column in columns}
        best = {
            side: max((speed for (owner, _), speed in found.items() if owner == side and speed), default=None)
            for side in ("armillary", "llama")
        }
        lines.append([case.name, *(speed(found[column]) for column in columns), ratio(best["armillary"], best["llama"])])
    return markdown(lines)


def offline(results: Sequence[Result], cases: Sequence[Case]) -> str:
    """A line a side of the offline case: new tokens a second, prompt tokens counted too, and the whole time. "" when there is none."""
    speeds = _speeds(results)
    lines = [["", "new tokens/s", "prompt and new tokens/s", "seconds"]]
    for case in cases:
        if case.kind != "offline":
            continue
        new = sum(case.new)
        lines[0][0] = f"{case.name}: {case.prompt_tokens:,} prompt and {new:,} new tokens"
        for column, name in NAMES.items():
            found = speeds.get((column, case.name))
            if found:
                lines.append([name, speed(found), speed(found * (case.prompt_tokens + new) / new), f"{new / found:.1f}"])
    return markdown(lines) if len(lines) > 1 else ""


def reached(results: Sequence[Result], bounds: Mapping[tuple[str, str], Bound]) -> str:
    """A line a variant and case of ours: what share of the machine's bound it reaches. `bounds` by (variant, case)."""
    lines = [["Armillary beside this machine's bound", "tokens/s", "bound", "set by", "reached"]]
    for (variant, case), bound in bounds.items():
        own, _ = fastest(results, "armillary", case, variant)
        if own:
            lines.append([f"{case}, {variant}", speed(own), speed(bound.speed), bound.by, f"{100 * own / bound.speed:.0f} %"])
    return markdown(lines)


def fastest(results: Sequence[Result], side: str, case: str, variant: str | None = None) -> tuple[float | None, str]:
    """Tokens a second and variant of a side's fastest result on a case (of one variant, when given); (None, "") when there is none."""
    found = [
        (result["tokens_per_second"], result["variant"])
        for result in results
        if (result["side"], result["case"]) == (side, case) and variant in (None, result["variant"])
    ]
    return max(found, default=(None, ""))


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


def speed(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return "-"
    return f"{tokens_per_second:,.1f}" if tokens_per_second < 100 else f"{tokens_per_second:,.0f}"


def ratio(own: float | None, other: float | None) -> str:
    return f"{own / other:.2f}" if own and other else "-"


def _speeds(results: Sequence[Result]) -> dict[tuple[Column, str], float]:
    return {((result["side"], result["variant"]), result["case"]): result["tokens_per_second"] for result in results}


def _short(column: Column) -> str:
    return "torch" if column[1].startswith("torch") else "ours"
