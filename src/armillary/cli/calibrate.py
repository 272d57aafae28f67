"""`armillary calibrate`: measure this machine into a profile file, for cost models and `--cluster`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import EngineFlags, Json

if TYPE_CHECKING:
    from armillary.cluster.profile import Profile


def calibrate(
    *,
    output: Annotated[Path | None, Parameter(help="The profile to write (default: profile.json in the cache folder).")] = None,
    model: Annotated[
        str | None, Parameter(show_default=False, help="Measure the engine with this model, too: what its iterations cost, as configured.")
    ] = None,
    seconds: Annotated[float, Parameter(help="How long the engine is measured, with --model.")] = 30.0,
    quick: Annotated[
        bool, Parameter(negative=(), show_default=False, help="A few figures in a few seconds: to see that it works.")
    ] = False,
    engine: EngineFlags = EngineFlags(),  # noqa: B008
    json: Json = False,
) -> None:
    """Measure this machine's products, memory and links into a profile file (under a minute).

    With --model the engine's iterations are added to the profile that is there, or to a new one.
    """
    from armillary.cli.terminal import note, print_json
    from armillary.cluster.profile import default_path
    from armillary.core.errors import InputError

    path = default_path() if output is None else output
    if model is not None:
        _engine(path, model, engine, seconds, quick, json)
        return
    if given := [name for name, value in asdict(engine).items() if value is not None and name != "threads"]:
        raise InputError(f"--{given[0].replace('_', '-')} is about an engine, and none is measured", "give --model, too", field=given[0])
    profile = _measure(engine.threads, quick)
    profile.save(path)
    if json:
        print_json(profile.model_dump(mode="json") | {"path": str(path), "disturbances": profile.disturbances})
    else:
        _print(profile)
        print(f"Written to {path}.")
    for reason in profile.disturbances:
        note(f"warning: {reason}: the figures may be too low; calibrate again on a quiet machine")


def _engine(path: Path, model: str, flags: EngineFlags, seconds: float, quick: bool, json: bool) -> None:
    """The profile at `path`, or a new one, with one engine more."""
    from armillary.cli.calibrate_engine import curves, print_curves, with_engine
    from armillary.cli.terminal import note, print_json
    from armillary.cluster.machine import describe
    from armillary.cluster.profile import load
    from armillary.core.errors import InputError

    if not 0.5 <= seconds <= 3600:
        raise InputError(f"an engine cannot be measured for {seconds:g} s", "give 0.5 to 3600", field="seconds")
    if not path.exists():
        _measure(flags.threads, quick).save(path)
    profile = load(path)
    if differs := profile.differs(describe()):
        raise InputError(f"{path} is another machine's profile ({'; '.join(differs)})", "write to another file with --output, or remove it")
    profile, name, found = with_engine(profile, model, flags, 0.5 if quick else seconds)
    profile.save(path)
    if json:
        print_json({"path": str(path), "engine": name, **curves(found)})
    else:
        print_curves(name, found)
        print(f"Written to {path}.")
    if disturbed := profile.engine[name][0]["disturbed"]:
        note(f"warning: {disturbed}: iterations may take less; calibrate again on a quiet machine")


def _measure(threads: int | None, quick: bool) -> Profile:
    import datetime
    import os
    import time

    from armillary.cli.terminal import timed
    from armillary.cluster.link_rates import measure_links
    from armillary.cluster.machine import describe
    from armillary.cluster.memory_rates import measure_memory
    from armillary.cluster.others import Others
    from armillary.cluster.profile import Identity, MemoryRate, ProductRate, Profile
    from armillary.core.errors import InputError
    from armillary.core.units import GB
    from armillary.kernels.product_rates import SHAPES, curves, measure_products

    machine = describe()
    threads = max(1, int(machine.usable_cores)) if threads is None else threads
    if not 1 <= threads <= machine.logical_cores:
        raise InputError(f"cannot calibrate with {threads} threads", f"this machine has {machine.logical_cores} cores", field="threads")
    patience, shapes = (0.05, SHAPES[:1]) if quick else (1.0, SHAPES)
    before, start, others = os.getloadavg()[0], time.monotonic(), Others()
    products: list[ProductRate] = []
    memory: list[MemoryRate] = []
    for curve in curves(threads):
        with timed(f"measuring {curve}") as done:
            products += measure_products(curve, shapes, seconds=0.12 * patience)
            done(f"measured {curve}")
    spare = machine.usable_memory
    size = 256_000_000 if not quick and (spare is None or spare > 4 * GB) else 64_000_000
    for count in sorted({1, threads}):
        with timed(f"measuring memory with {count} thread{'s' if count != 1 else ''}"):
            memory += measure_memory(count, size, 0.8 * patience)
    with timed("measuring links between two processes"):
        links = measure_links(0.4 * patience)
    return Profile(
        machine=Identity.of(machine),
        taken=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        seconds=time.monotonic() - start,
        load_before=before,
        load_after=os.getloadavg()[0],
        others=others.share(machine.logical_cores),
        products=tuple(products),
        memory=tuple(memory),
        links=links,
    )


def _print(profile: Profile) -> None:
    from armillary.cli.terminal import table
    from armillary.core.units import format_bytes, format_duration, format_rate

    print(f"{profile.machine.cpu}, {profile.machine.physical_cores} cores, measured in {profile.seconds:.0f} s")
    tokens = sorted({rate.m for rate in profile.products})
    rows: dict[tuple[Any, ...], dict[int, str]] = {}
    for rate in profile.products:
        row = rows.setdefault((rate.library, rate.dtype, rate.threads, f"{rate.n} x {rate.k}"), {})
        row[rate.m] = format_rate(rate.flops, "FLOP")
    table(
        ("library", "weights", "threads", "shape", *(f"{m} token{'s' if m != 1 else ''}" for m in tokens)),
        [(*key, *(row.get(m, "") for m in tokens)) for key, row in rows.items()],
        title="Products with fp32 activations",
    )
    print()
    table(
        ("operation", "threads", "bandwidth"),
        [(rate.operation, rate.threads, format_rate(rate.bandwidth)) for rate in profile.memory],
        title=f"Memory, buffers of {format_bytes(profile.memory[0].size)}",
    )
    print()
    table(
        ("link", "latency", "bandwidth", *(format_bytes(each.size) for each in profile.links[0].transfers)),
        [
            (
                rate.name,
                format_duration(rate.latency),
                format_rate(rate.bandwidth),
                *(format_duration(each.seconds * 1e9) for each in rate.transfers),
            )
            for rate in profile.links
        ],
        title="Links between two processes, one way",
    )
    print()
