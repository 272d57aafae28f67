"""`armillary plan overlap`: nano-batches whose operations use compute, memory and network of a device at once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.plan.overlap import Found, Schedule
    from armillary.sim.interference import Interference

_WIDTH = 112  # of the picture, in characters


def overlap(
    model: Annotated[str, Parameter(help="A published architecture (llama-2-70b, ...), a model's name, folder or config.json.")],
    /,
    *,
    cluster: Annotated[str, Parameter(help="Devices, such as a100x8 or dgx-h100 (armillary cluster lists them).")],
    tensor_parallel: Annotated[int, Parameter(name=("--tensor-parallel", "--tp"), help="Devices that split each layer.")] = 1,
    batch: Annotated[int, Parameter(help="Tokens of an iteration, of prompts and of decodes.")] = 2048,
    lengths: Annotated[str, Parameter(help="PROMPT+ANSWER tokens of a request: an iteration has them in that proportion.")] = "512+512",
    weights: Annotated[str, Parameter(help="Format of weights.")] = "fp16",
    kv_dtype: Annotated[str, Parameter(help="Format of keys and values.")] = "fp16",
    parts: Annotated[int, Parameter(help="Most nano-batches, 1 to 4.")] = 4,
    layers: Annotated[int, Parameter(help="Layers that are scheduled together, 1 to 4.")] = 2,
    flops: Annotated[
        float | None, Parameter(show_default=False, help="FLOP/s that products attain, such as 260e12 (default: the catalogue's figure).")
    ] = None,
    interference: Annotated[
        str, Parameter(help="How operations slow each other down: nanoflow-a100 (its table), or none.")
    ] = "nanoflow-a100",
    seconds: Annotated[float, Parameter(help="How long each mixed-integer program may search.")] = 5.0,
    save: Annotated[Path | None, Parameter(help="Write the schedule as a trace: Chrome/Perfetto JSON.")] = None,
    html: Annotated[Path | None, Parameter(help="Write the report: the schedule, the numbers of nano-batches that were tried.")] = None,
    json: Json = False,
) -> None:
    """Find nano-batches, their order and their shares of the device (Zhu et al., NanoFlow, OSDI 2025)."""
    from armillary.cli.plan_files import checked_folder, printed
    from armillary.cli.terminal import print_json, timed
    from armillary.cluster.cluster import cluster as spelled
    from armillary.core.errors import InputError
    from armillary.models.graph.cost import Deployment
    from armillary.models.graph.find import find
    from armillary.models.graph.layout import Layout
    from armillary.models.graph.precision import Precision
    from armillary.plan.overlap import Load, Machine, search, trace
    from armillary.sim.interference import interference as named

    checked_folder(save, html)
    if not 0.1 <= seconds <= 600:
        raise InputError(f"a program cannot search for {seconds:g} s", "give 0.1 to 600", field="seconds")
    if flops is not None and not 1e6 <= flops <= 1e21:
        raise InputError(f"products of {flops:g} FLOP/s", "give FLOP/s, such as 260e12", field="flops")
    table = named(interference)
    load = Load(batch, *_lengths(lengths))
    place = Deployment(find(model), spelled(cluster), Layout(tensor_parallel=tensor_parallel), Precision(weights, "fp16", kv_dtype))
    machine = Machine(place, place.roofline().rates.flops if flops is None else flops)
    with timed("searching") as close:
        found = search(machine, load, table, parts=parts, layers=layers, seconds=seconds)
        close(f"{len(found.tried)} numbers of nano-batches")
    title = f"{place.model.name} on {place.layout.devices} x {place.device.name}, {batch:,} tokens an iteration"
    if save is not None:
        trace(found.best, title).save(save)
    if html is not None:
        _page(title, found, table).write(html)
    if json:
        print_json(_facts(found, table))
        return
    print(title + "\n")
    _tell(found, table)
    printed(save, html)


def _lengths(text: str) -> tuple[int, int]:
    from armillary.core.errors import InputError
    from armillary.serve.workload.lengths import alike

    both = alike(text)
    if both is None:
        raise InputError(f"lengths is {text[:40]!r}", "write PROMPT+ANSWER, such as 512+512", field="lengths")
    return both


def gantt(schedule: Schedule, width: int = _WIDTH) -> list[str]:
    """A line a resource: who runs when, by operation and nano-batch."""
    rows = []
    for lane in ("compute", "memory", "network"):
        cells = [" "] * width
        for place, task in enumerate(schedule.tasks):
            own = [piece for piece in schedule.execution.pieces if piece.place == place]
            if task.resource != lane or not own:
                continue
            first, end = (int(at / schedule.execution.makespan * width) for at in (own[0].start, own[-1].end))
            size = max(1, min(end, width) - first)
            cells[first : first + size] = f"|{task.name.partition(',')[0]} {task.name.rpartition(' ')[2]}".ljust(size, ".")[:size]
        rows.append(f"{lane:<8}{''.join(cells)}")
    return rows


def arithmetic(found: Found, table: Interference) -> list[tuple[str, str]]:
    """(what, how), line by line."""
    from armillary.core.units import format_duration, format_rate

    def time(seconds: float) -> str:
        return format_duration(seconds * 1e9)

    machine, load, best = found.machine, found.load, found.best
    busy: dict[str, float] = {}
    for _, resource, seconds in machine.layer(load):
        busy[resource] = busy.get(resource, 0.0) + seconds
    one, own = found.whole / best.layers, best.execution.makespan / best.layers
    shares = "; ".join(
        " and ".join(f"{name} {share:.0%}" for name, share in sorted(given.items()))
        for given in best.execution.shares.values()
        if sum(given.values()) > max(given.values())
    )
    optimum = machine.optimum
    return [
        (
            "an iteration",
            f"{load.tokens - load.decodes:,} tokens of prompts of {load.prompt:,} and {load.decodes:,} decodes after {load.cached:,} tokens on average",
        ),
        (
            "a layer, one operation after another",
            f"{' + '.join(f'{name} {time(seconds)}' for name, seconds in busy.items())} = {time(one)}",
        ),
        ("left out", f"norms, rotations and sums: {time(machine.left_out(load))} a layer, were none of them fused with its neighbours"),
        (
            "the order alone",
            f"{time(best.order.makespan / best.layers)} a layer ({'no order is shorter' if best.order.optimal else 'the program was given up: a shorter one may exist'}), "
            f"where the busiest part of the device alone needs {time(best.bound / best.layers)}",
        ),
        (
            "with interference",
            f"{time(own)} a layer; no order and no shares in tenths need less than {time(best.least / best.layers)} ({table.source})",
        ),
        ("shares of the device", shares or "nothing runs beside anything else"),
        (
            "over one after another",
            f"{time(one)} / {time(own)} = {one / own:.3f}x; without interference {one / (best.order.makespan / best.layers):.3f}x",
        ),
        (
            "throughput",
            f"{found.throughput(own):,.0f} tokens a second and device with {machine.layers:g} layers, embedding and head ({found.throughput(own, True):,.0f} with what is left out); "
            f"{found.throughput(one):,.0f} one after another",
        ),
        (
            "the optimum",
            f"compute / (2 x parameters of a token) = {format_rate(machine.flops, 'FLOP')} / (2 x {machine.flops / optimum / 2:,.3g}) = {optimum:,.0f} tokens a second and device: "
            f"{found.throughput(own) / optimum:.1%} of it is reached",
        ),
    ]


_COLUMNS = ("nano-batches", "tokens of each", "one after another", "order alone", "with interference", "at least", "order is")


def _rows(found: Found) -> list[tuple[str, ...]]:
    from armillary.core.units import format_duration

    def time(one: Schedule, seconds: float) -> str:
        return format_duration(seconds / one.layers * 1e9)

    return [
        (
            f"{len(one.sizes)}{' *' if one is found.best else ''}", " + ".join(map(str, one.sizes)), time(one, one.sequential), time(one, one.order.makespan),
            time(one, one.execution.makespan), time(one, one.least), "optimal" if one.order.optimal else "given up",
        )
        for one in found.tried
    ]  # fmt: skip


def _tell(found: Found, table: Interference) -> None:
    from armillary.cli.terminal import table as drawn

    drawn(_COLUMNS, _rows(found), title="a layer's time")
    print()
    for line in gantt(found.best):
        print(line)
    print()
    for what, how in arithmetic(found, table):
        print(f"{what}: {how}")


def _page(title: str, found: Found, table: Interference) -> Any:
    from armillary.plan.overlap import trace
    from armillary.web.planner_page import Page

    page = Page(
        title,
        f"{len(found.best.sizes)} nano-batches. Virtual time: operations at the roofline alone, and beside others by {table.name} ({table.source}).",
    )
    page.heading("The schedule: what runs on which part of the device")
    page.gantt(trace(found.best, f"{found.best.layers} layers"))
    page.heading("By its arithmetic")
    page.lines(arithmetic(found, table))
    page.heading("Numbers of nano-batches, a layer's time")
    page.table(_COLUMNS, _rows(found))
    return page


def _facts(found: Found, table: Interference) -> dict[str, Any]:
    def plain(one: Schedule) -> dict[str, Any]:
        return {
            "sizes": one.sizes, "layers": one.layers, "sequential": one.sequential, "order": one.order.makespan, "optimal": one.order.optimal,
            "makespan": one.execution.makespan, "bound": one.bound, "least": one.least,
            "shares": [{"busy": sorted(among), **given} for among, given in one.execution.shares.items()],
        }  # fmt: skip

    best, spans = found.best, []
    for piece in best.execution.pieces:
        task = best.tasks[piece.place]
        spans.append(
            {
                "task": task.name,
                "resource": task.resource,
                "start": piece.start,
                "end": piece.end,
                "share": piece.share,
                "speed": piece.speed,
            }
        )
    return {
        "best": plain(best) | {"schedule": spans}, "tried": [plain(one) for one in found.tried], "unsplit": found.whole, "interference": table.name,
        "tokens_per_second_per_device": found.throughput(best.execution.makespan / best.layers), "optimum": found.machine.optimum,
        "speedup": found.whole / best.execution.makespan,
    }  # fmt: skip
