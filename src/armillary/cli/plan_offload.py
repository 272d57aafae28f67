"""`armillary plan offload`: a model larger than its accelerator, over its memory, RAM and disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.models.config import ModelConfig
    from armillary.plan.offload import Found
    from armillary.plan.offload_terms import Phase


def offload(
    model: Annotated[str, Parameter(help="A published architecture (opt-30b, ...), a model's name, folder, .gguf file or config.json.")],
    /,
    *,
    cluster: Annotated[
        str, Parameter(help="A device or node (t4, t4-flexgen), or the profile.json of this machine (armillary calibrate).")
    ] = "t4",
    accelerator_memory: Annotated[
        str | None, Parameter(show_default=False, help="Of the accelerator; of this machine, the part that stands for one.")
    ] = None,
    memory: Annotated[
        str | None, Parameter(show_default=False, help="RAM beside it, such as 208GB (default: the catalogue's or the machine's).")
    ] = None,
    disk: Annotated[str | None, Parameter(show_default=False, help="Disk that may be filled (default: the catalogue's, or none).")] = None,
    disk_read: Annotated[str | None, Parameter(show_default=False, help="Bytes a second from disk, such as 2GB.")] = None,
    disk_write: Annotated[str | None, Parameter(show_default=False, help="Bytes a second to disk.")] = None,
    prompt: Annotated[int, Parameter(help="Tokens of a prompt.")] = 512,
    answer: Annotated[int, Parameter(help="Tokens of an answer.")] = 32,
    compress: Annotated[Literal["none", "int4"], Parameter(help="Weights, keys and values in 4 bits, in groups of 64.")] = "none",
    block: Annotated[int, Parameter(help="Most sequences that pass a layer while its weights stay.")] = 1024,
    output: Annotated[Path | None, Parameter(help="Write the plan: `armillary serve --plan` executes it where its hardware is.")] = None,
    html: Annotated[Path | None, Parameter(help="Write the report: the placement, its arithmetic, every block that fits.")] = None,
    json: Json = False,
) -> None:
    """Find percentages of weights, keys and activations, and the block, by FlexGen's linear program (Sheng et al., ICML 2023)."""
    from armillary.cli.plan_files import checked_folder, printed
    from armillary.cli.terminal import print_json, timed
    from armillary.cluster.cluster import cluster as spelled
    from armillary.cluster.profile import load
    from armillary.core.errors import InputError
    from armillary.core.units import parse_bytes
    from armillary.models.graph.find import find
    from armillary.plan.offload import search, work_of
    from armillary.plan.offload_file import written
    from armillary.plan.offload_place import place

    checked_folder(output, html)
    sizes = {"arena": accelerator_memory, "ram": memory, "disk": disk, "read": disk_read, "write": disk_write}
    given = {name: None if text is None else parse_bytes(text) for name, text in sizes.items()}
    for name in ("read", "write"):
        if given[name] == 0:
            raise InputError(f"a disk of 0 bytes a second ({name})", "give more, or --disk 0 for none", field=f"disk_{name}")
    where = place(spelled(cluster), load(Path(cluster)) if cluster.endswith(".json") else None, **given)
    work = work_of(find(model), where, prompt, answer, compress == "int4")
    with timed("searching") as close:
        found = search(work, where, _config(model) if where.here else None, most=block)
        close(f"{len(found.tried)} sizes of blocks fit")
    if output is not None:
        written(model, cluster, found).save(output)
    if html is not None:
        _page(model, found).write(html)
    if json:
        print_json(_facts(model, cluster, found))
        return
    _tell(model, found)
    printed(output, html)


def _config(model: str) -> ModelConfig | None:
    """Of a model that the engine could load; None for an architecture without weights."""
    from armillary.models import hub
    from armillary.models.config_file import read_config
    from armillary.models.graph.published import published

    return None if model.lower() in published() else read_config(hub.resolve(model, fetch=False))


def arithmetic(found: Found) -> list[tuple[str, str]]:
    """(what, how), line by line."""
    from armillary.core.units import format_bytes, format_duration
    from armillary.plan.offload_terms import full, phases

    def time(seconds: float) -> str:
        return format_duration(seconds * 1e9)

    def carried(phase: Phase) -> str:
        return ", ".join(f"{link} {format_bytes(size)}" for link, size in phase.carried.items()) or "nothing moves"

    work, policy, price, place = found.best.work, found.policy, found.price, found.place
    first, token = phases(found)
    lines = [
        (
            "placement",
            f"weights {policy.weights}, keys and values {policy.cache}, activations {policy.hidden}: percent in the accelerator, RAM and on disk",
        ),
        (
            "a layer",
            f"{format_bytes(work.layer_bytes * work.kept)} of weights; {format_bytes(2 * work.element * (work.prompt + work.answer) * work.widths[1] * work.kept)} of keys and "
            f"values a sequence at its end; blocks of {work.block} sequences, {policy.batches} x {work.batch}",
        ),
        (
            "prefill of a layer",
            f"max({', '.join(f'{name} {time(value)}' for name, value in first.terms.items())}) = {time(first.seconds)}: {first.longest} binds. Carried: {carried(first)}",
        ),
        (
            "a token of a layer",
            f"into the accelerator {time(token.first)} + max({', '.join(f'{name} {time(value)}' for name, value in token.terms.items())}) = {time(token.seconds)}: "
            f"{'what comes in' if token.first > max(token.terms.values()) else token.longest} binds. Carried: {carried(token)}",
        ),
        (
            "passes",
            f"{work.answer - 1} tokens of {work.layers} layers"
            + (f" and of a head as large as {work.head:.2g} of them, and its first token" if work.head else ""),
        ),
        (
            "the block",
            f"{work.layers} x {time(price.prefill)} + {work.passes:.4g} x {time(price.generation)} = {time(price.total)} for {work.block} x {work.answer} tokens: "
            f"{price.throughput:.4g} tokens a second",
        ),
        ("full", f"{', '.join(full(found)) or 'nothing'}, to {place.hardware(work).margin:.0%} of its size"),
        ("rates", place.source),
    ]
    if found.best.price.throughput > price.throughput * 1.0005:
        lines.insert(
            1,
            (
                "before it is rounded",
                f"{found.best.price.throughput:.4g} tokens a second: whole percents, and buffers that the engine counts",
            ),
        )
    return lines


_COLUMNS = ("block", "batch", "weights", "keys and values", "activations", "tokens a second")


def _rows(found: Found, most: int) -> list[tuple[str, ...]]:
    return [
        (f"{one.work.block}", f"{one.work.batch}", str(one.weights), str(one.cache), str(one.hidden), f"{one.price.throughput:.4g}")
        for one in found.tried[:most]
    ]


def _tell(model: str, found: Found) -> None:
    from armillary.cli.terminal import table
    from armillary.core.units import format_bytes
    from armillary.plan.offload_file import told

    place, work = found.place, found.best.work
    print(
        f"{model} on {place.device.title if place.here else place.device.name} with {format_bytes(place.arena)}, {format_bytes(place.ram)} of RAM and {format_bytes(place.disk)} of disk: "
        f"{found.price.throughput:.4g} tokens a second, prompts of {work.prompt} and answers of {work.answer}\n"
    )
    for what, how in arithmetic(found):
        print(f"{what}: {how}")
    print()
    table(_COLUMNS, _rows(found, 5), title="the best blocks, by the linear program")
    if place.here:
        print(
            f'\narmillary serve {model} --offload "{told(found)}" --offload-memory {place.arena} --max-running {work.block} --max-batch-tokens {work.block * work.prompt} '
            f"--context {work.prompt + work.answer}{' --offload-compress int4' if work.compressed else ''}"
        )


def _page(model: str, found: Found) -> Any:
    from armillary.core.trace_gantt import COLOURS
    from armillary.web.planner_page import Page

    page = Page(
        f"{model} on {found.place.device.name}, offloaded",
        f"{found.price.throughput:.4g} tokens a second by FlexGen's cost model: {found.place.source}.",
    )
    page.heading("By its arithmetic")
    page.lines(arithmetic(found))
    page.heading("Throughput by the size of the block")
    batches = sorted({one.work.batch for one in found.tried})
    curves = []
    for place, batch in enumerate(batches):
        those = sorted((one for one in found.tried if one.work.batch == batch), key=lambda one: one.work.block)
        curves.append(
            {
                "name": f"batches of {batch}", "mode": "lines+markers", "line": {"color": COLOURS[place % len(COLOURS)]}, "x": [one.work.block for one in those],
                "y": [one.price.throughput for one in those], "text": [f"weights {one.weights}, cache {one.cache}, activations {one.hidden}" for one in those],
            }
        )  # fmt: skip
    page.plot(
        curves,
        {
            "xaxis": {"title": {"text": "sequences of a block"}, "type": "log"},
            "yaxis": {"title": {"text": "tokens a second"}, "rangemode": "tozero"},
        },
    )
    page.table(_COLUMNS, _rows(found, 200))
    return page


def _facts(model: str, cluster: str, found: Found) -> dict[str, Any]:
    from armillary.plan.offload_file import written
    from armillary.plan.offload_terms import full, phases

    first, token = phases(found)
    phase = [{"seconds": one.seconds, "into_accelerator": one.first, "terms": one.terms, "carried": one.carried} for one in (first, token)]
    tried = [
        {"block": one.work.block, "batch": one.work.batch, "weights": one.weights.shares, "cache": one.cache.shares, "hidden": one.hidden.shares,
         "tokens_per_second": one.price.throughput}
        for one in found.tried
    ]  # fmt: skip
    plan = written(model, cluster, found).model_dump(mode="json")
    return {"plan": plan, "prefill": phase[0], "token": phase[1], "full": full(found), "peaks": dict(found.price.peaks), "tried": tried}
