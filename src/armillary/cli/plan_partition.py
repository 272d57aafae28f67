"""`armillary plan partition`: how a dense model lies over chips, for prefill and for decode."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.plan.frontier import Point
    from armillary.plan.partition import Phase, Plan, Problem


def partition(
    model: Annotated[str, Parameter(help="A published architecture (palm-540b, llama-2-70b, ...), a model's name, folder or config.json.")],
    /,
    *,
    cluster: Annotated[str, Parameter(help="A node, a rack or several: tpu-v4-cube, dgx-a100 (armillary cluster lists them).")],
    batch: Annotated[int, Parameter(help="Sequences that decode together.")],
    context: Annotated[int, Parameter(help="Tokens of a sequence: of its prompt in prefill, of its cache in decode.")] = 2048,
    prefill_batch: Annotated[int | None, Parameter(show_default=False, help="Sequences of a prefill (default: --batch).")] = None,
    chips: Annotated[int | None, Parameter(show_default=False, help="How many of the cluster's devices (default: all).")] = None,
    weights: Annotated[str, Parameter(help="Format of weights; products are computed in 16 bits.")] = "bf16",
    kv_dtype: Annotated[str, Parameter(help="Format of keys and values.")] = "bf16",
    kv_share: Annotated[
        float | None,
        Parameter(show_default=False, help="Share of memory for keys and values, for the longest contexts (default: what weights leave)."),
    ] = None,
    html: Annotated[Path | None, Parameter(help="Write the report: all partitions, the arithmetic, cost against latency.")] = None,
    json: Json = False,
) -> None:
    """Choose the partition that takes least time (Pope et al., MLSys 2023): 1D or 2D weight-stationary, or weight-gathered."""
    from armillary.cli.plan_files import checked_folder, printed
    from armillary.cli.terminal import print_json
    from armillary.cluster.cluster import cluster as spelled
    from armillary.core.errors import InputError
    from armillary.models.graph.find import find
    from armillary.models.graph.precision import Precision
    from armillary.plan.frontier import frontier, points
    from armillary.plan.partition import Problem, mesh

    checked_folder(html)
    prefill = batch if prefill_batch is None else prefill_batch
    for name, value, most in (("batch", batch, 1 << 20), ("prefill_batch", prefill, 1 << 20), ("context", context, 1 << 24)):
        if not 1 <= value <= most:
            raise InputError(f"{name} is {value:,}", f"give 1 to {most:,}", field=name)
    if kv_share is not None and not 0 < kv_share <= 1:
        raise InputError(f"kv_share is {kv_share:g}", "give a share over 0 and at most 1", field="kv_share")
    found, place = find(model), spelled(cluster)
    if context > found.max_context and found.position_table:
        raise InputError(f"context {context:,} is more than the {found.max_context:,} tokens of {found.name}", "give less", field="context")
    precision = Precision(weights, "bf16", kv_dtype)
    problem = Problem(found, place, mesh(place, chips), precision)
    ranked: dict[Phase, list[Plan]] = {
        "prefill": problem.ranked("prefill", prefill, context),
        "decode": problem.ranked("decode", batch, context),
    }
    formats = tuple(dict.fromkeys((weights, "bf16", "int8")))
    tried = points(found, place, precision, "decode", context, weights=formats, most_chips=problem.mesh.chips)
    best = frontier(tried)
    if html is not None:
        _page(problem, ranked, tried, best, batch, context, kv_share).write(html)
    if json:
        print_json(_facts(problem, ranked, best, batch, context, kv_share))
        return
    _tell(problem, ranked, best, batch, context, kv_share)
    printed(html)


def longest(problem: Problem, batch: int, share: float | None) -> list[tuple[str, int]]:
    """The longest contexts by heads and by batch, weights where they are."""
    from armillary.models.graph.spread import Spread

    chips = problem.mesh.chips
    spreads = [Spread(1, chips), Spread(1, chips, 1, "batch")] if chips > 1 else [Spread(1, 1)]
    return [(one.attention, problem.context(one, batch, share)) for one in spreads]


def arithmetic(problem: Problem, plan: Plan) -> list[tuple[str, str]]:
    """(what, how) of a partition, line by line."""
    from armillary.core.units import format_bytes, format_duration, format_flops, format_rate

    device, chips, link = problem.cluster.device, problem.mesh.chips, problem.mesh.link

    def time(seconds: float) -> str:
        return format_duration(seconds * 1e9)

    lines = [
        (
            "compute",
            f"{format_flops(plan.compute * problem.flops)} a chip at {format_rate(problem.flops, 'FLOP')} ({problem.products}): {time(plan.compute)}",
        ),
        (
            "memory",
            f"weights as the chip multiplies with them and {format_bytes(plan.cache)} of keys and values at {format_rate(device.attainable_bandwidth)}: {time(plan.memory)}",
        ),
    ]
    if link is not None:
        near = problem.mesh.near
        within = "" if near is None else f", within {problem.mesh.domain} chips at {format_rate(near.bandwidth)} ({near.name})"
        lines.append(
            (
                "network",
                f"{format_bytes(plan.moved)} sent by each chip at {format_rate(link.bandwidth)}, and {format_duration(link.latency)} a hop ({link.name}){within}: {time(plan.network)}",
            )
        )
    lines += [
        ("a pass", f"max(compute, memory) + network = {time(plan.seconds)}; at least {time(plan.hidden)} with everything at once"),
        (
            "what it costs",
            f"{plan.tokens:,} tokens on {chips} chips: {plan.chip_seconds * 1e3:.4g} ms of a chip a token; {plan.mfu:.1%} of the chips' peak is the model's",
        ),
        (
            "held by the fullest chip",
            f"{format_bytes(plan.held)} weights{' with a gathered layer' if plan.spread.gathered > 1 else ''}, {format_bytes(plan.cache)} keys and values, "
            f"of {format_bytes(problem.usable)} for both",
        ),
    ]
    return lines


def _rows(plans: list[Plan]) -> list[tuple[str, ...]]:
    from armillary.core.units import format_bytes, format_duration

    return [
        (
            one.spread.name, one.spread.attention, format_duration(one.seconds * 1e9), format_duration(one.compute * 1e9), format_duration(one.memory * 1e9),
            format_duration(one.network * 1e9), format_bytes(one.moved), f"{one.mfu:.1%}", format_bytes(one.held + one.cache),
        )
        for one in plans
    ]  # fmt: skip


_COLUMNS = ("weights", "cache by", "a pass", "compute", "memory", "network", "a chip sends", "MFU", "a chip holds")
_FRONT = ("chips", "sequences", "weights", "partition", "a token", "chip-ms a token", "MFU")


def _front(best: list[Point]) -> list[tuple[str, ...]]:
    from armillary.core.units import format_duration

    return [
        (
            f"{one.plan.spread.chips}", f"{one.plan.sequences}", one.weights, f"{one.plan.spread.name}, cache by {one.plan.spread.attention}",
            format_duration(one.latency * 1e9), f"{one.cost * 1e3:.4g}", f"{one.plan.mfu:.1%}",
        )
        for one in best
    ]  # fmt: skip


def _tell(problem: Problem, ranked: dict[Phase, list[Plan]], best: list[Point], batch: int, context: int, share: float | None) -> None:
    from armillary.cli.terminal import table

    model, place = problem.model, problem.mesh
    shape = f" ({' x '.join(map(str, place.shape))} torus)" if place.torus else ""
    print(f"{model.name} in {problem.precision.weights} on {place.chips} x {problem.cluster.device.name}{shape}")
    for phase, plans in ranked.items():
        first = plans[0]
        what = (
            f"{first.sequences} prompt{'s' if first.sequences > 1 else ''} of {context:,} tokens"
            if phase == "prefill"
            else f"one token of {batch} sequences of {context:,}"
        )
        print(f"\n{phase}, {what}: {first.spread.name}, cache by {first.spread.attention}")
        table(_COLUMNS, _rows(plans[:5]))
        for name, how in arithmetic(problem, first):
            print(f"  {name}: {how}")
    room = "what weights leave" if share is None else f"{share:.0%} of a chip"
    print(
        f"\nlongest context of {batch} sequences in {room}: "
        + ", ".join(f"{tokens:,} tokens by {kind}" for kind, tokens in longest(problem, batch, share))
    )
    print(f"\ncost against latency of decode at {context:,} tokens, what nothing beats in both:")
    table(_FRONT, _front(best))
    print(f"\n{_CAVEAT}")


_CAVEAT = "a roofline: collectives wait for everything else, and nothing else is counted; PaLM 540B on 64 TPU v4 took 1.3 to 2.3 times as long (armillary reproduce pope)"


def _page(
    problem: Problem, ranked: dict[Phase, list[Plan]], tried: list[Point], best: list[Point], batch: int, context: int, share: float | None
) -> Any:
    from armillary.core.trace_gantt import COLOURS
    from armillary.web.planner_page import Page

    title = f"{problem.model.name} over {problem.mesh.chips} x {problem.cluster.device.name}"
    page = Page(title, f"Partitions for {batch} sequences of {context:,} tokens, weights in {problem.precision.weights}. {_CAVEAT}.")
    for phase, plans in ranked.items():
        page.heading(f"{phase}: {plans[0].spread.name}, cache by {plans[0].spread.attention}")
        page.lines(arithmetic(problem, plans[0]))
        page.table(_COLUMNS, _rows(plans))
    page.heading("Longest contexts")
    page.table(("cache by", "tokens"), [(kind, f"{tokens:,}") for kind, tokens in longest(problem, batch, share)])
    page.heading(f"Cost against latency of decode at {context:,} tokens")
    lines: dict[tuple[int, str], list[Point]] = {}
    for one in tried:
        lines.setdefault((one.plan.spread.chips, one.weights), []).append(one)
    curves = [
        _curve(f"{chips} chips, {name}", those, {"color": COLOURS[place % len(COLOURS)]})
        for place, ((chips, name), those) in enumerate(lines.items())
    ]
    axes = {"xaxis": {"title": {"text": "ms a token"}, "type": "log"}, "yaxis": {"title": {"text": "chip-ms a token"}, "type": "log"}}
    page.plot([*curves, _curve("what nothing beats", best, {"color": "#222", "dash": "dot"})], axes)
    page.table(_FRONT, _front(best))
    return page


def _curve(name: str, those: list[Point], line: dict[str, str]) -> dict[str, Any]:
    return {
        "name": name, "mode": "lines+markers", "line": line, "x": [one.latency * 1e3 for one in those], "y": [one.cost * 1e3 for one in those],
        "text": [f"{one.plan.sequences} sequences, {one.plan.spread.name}, cache by {one.plan.spread.attention}" for one in those],
    }  # fmt: skip


def _facts(
    problem: Problem, ranked: dict[Phase, list[Plan]], best: list[Point], batch: int, context: int, share: float | None
) -> dict[str, Any]:
    def plain(plan: Plan) -> dict[str, Any]:
        names = (
            "sequences",
            "tokens",
            "compute",
            "memory",
            "network",
            "seconds",
            "hidden",
            "moved",
            "held",
            "cache",
            "mfu",
            "chip_seconds",
        )
        return {"partition": plan.spread.name, "chips": plan.spread.chips, "attention": plan.spread.attention} | {
            name: getattr(plan, name) for name in names
        }

    return {
        "model": problem.model.name, "device": problem.cluster.device.name, "chips": problem.mesh.chips, "weights": problem.precision.weights,
        "context": context, **{phase: [plain(one) for one in plans] for phase, plans in ranked.items()}, "longest": dict(longest(problem, batch, share)),
        "frontier": [plain(one.plan) | {"weights": one.weights} for one in best],
    }  # fmt: skip
