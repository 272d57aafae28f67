"""The bars that the serving kernels are held to: a ratio over a peer's best, or a share of what the machine allows, from one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from limits import Bound
from table import Result, fastest, markdown, ratio, speed

VLLM = ("vllm",)
LLAMA = ("llama",)
SERVER = ("llama_server",)
BOUND = ()  # no peer: the machine's own bound


@dataclass(frozen=True)
class Bar:
    """`variant` of ours against the fastest variant of `peer` on `case`, at least `least` times as fast; `stretch` is the goal after that."""

    case: str
    variant: str
    peer: tuple[str, ...]
    least: float | None
    stretch: float


BARS = (
    Bar("decode-1-after-32", "int4", LLAMA, 1.7, 2.3),
    Bar("decode-1-after-32", "int4", BOUND, None, 0.75),
    Bar("prefill-512", "int4", LLAMA, 3.0, 4.5),
    Bar("prefill-512", "int4", VLLM, 1.2, 1.8),
    Bar("decode-8-after-32", "int4", VLLM, 3.0, 4.5),
    Bar("decode-32-after-32", "int4", VLLM, 2.0, 3.2),
    Bar("prefill-512", "fp32", VLLM, 1.0, 1.3),
    Bar("decode-8-after-32", "fp32", VLLM, 1.5, 2.0),
    Bar("decode-32-after-32", "fp32", VLLM, 1.3, 1.8),
    Bar("offline-64", "int4", VLLM, 1.4, 2.0),
    Bar("offline-64", "int4", SERVER, 2.5, 4.0),
)
NAMES: Mapping[tuple[str, ...], str] = {
    VLLM: "vLLM, compiled, fp32",
    LLAMA: "llama.cpp",
    SERVER: "llama.cpp's server, 8 slots",
    BOUND: "memory bound here",
}


def verdict(reached: float | None, bar: Bar) -> str:
    """ "-" when not measured; "no" below the bar (or, where there is only a stretch, below that)."""
    if reached is None:
        return "-"
    if reached >= bar.stretch:
        return "stretch"
    if bar.least is None:
        return "not yet"
    return "yes" if reached >= bar.least else "no"


def bars(results: Sequence[Result], bounds: Mapping[tuple[str, str], Bound]) -> str:
    """A line a bar. `bounds` by (variant, case)."""
    lines = [["tokens/s", "Armillary", "against", "its best", "ratio", "bar", "stretch", "met"]]
    for bar in BARS:
        own, _ = fastest(results, "armillary", bar.case, bar.variant)
        if bar.peer:
            other, variant = fastest(results, bar.peer[0], bar.case)
            name = NAMES[bar.peer] + (f" {variant}" if variant and variant != "fp32" else "")
        else:
            bound = bounds.get((bar.variant, bar.case))
            other, name = (bound.speed if bound else None), NAMES[BOUND]
        reached = own / other if own and other else None
        least = "-" if bar.least is None else f"{bar.least:g}"
        lines.append(
            [
                f"{bar.case}, {bar.variant}",
                speed(own),
                name,
                speed(other),
                ratio(own, other),
                least,
                f"{bar.stretch:g}",
                verdict(reached, bar),
            ]
        )
    return markdown(lines)
