"""`armillary doctor`: what this machine offers, and what will be slow on it and why."""

from __future__ import annotations

import os
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from armillary.cli.settings import Json

if TYPE_CHECKING:
    from armillary.cluster.machine import Machine


def doctor(
    *,
    measure: Annotated[bool, Parameter(help="Measure the rates of arithmetic and memory (about two seconds).")] = True,
    json: Json = False,
) -> None:
    """What this machine offers, and what will be slow on it and why."""
    from armillary.cli.terminal import print_json, table, timed
    from armillary.cluster.machine import describe, slow_paths
    from armillary.core.paths import cache_dir

    with timed("measuring this machine" if measure else "looking at this machine") as done:
        machine = describe(measured=measure)
        done("measured this machine" if measure else "looked at this machine")
    cache = cache_dir()
    slow = slow_paths(machine)
    if json:
        print_json(
            asdict(machine) | {"slow": slow, "cache": str(cache), "cache_free_bytes": _free(cache), "cache_writable": _writable(cache)}
        )
        return
    table(("", ""), _rows(machine, cache))
    print()
    print("What will be slow here:" if slow else "Nothing stands out as slow here.")
    for line in slow:
        print(f"- {line}")


def _rows(machine: Machine, cache: Path) -> list[tuple[str, Any]]:
    from armillary.core.units import format_bytes, format_rate

    cores = f"{machine.physical_cores} physical, {machine.logical_cores} logical"
    if machine.usable_cores < machine.logical_cores:
        cores += f", {machine.usable_cores:g} of them usable by this process"
    memory = ", ".join(
        f"{format_bytes(size)} {word}"
        for size, word in ((machine.memory_total, "in all"), (machine.memory_available, "available"), (machine.memory_limit, "allowed"))
        if size is not None
    )
    rows: list[tuple[str, Any]] = [
        ("processor", machine.cpu),
        ("cores", cores),
        ("instruction sets", " ".join(machine.isa) or "none that matter"),
        ("memory", memory or "unknown"),
        ("GPU", ", ".join(f"{gpu.name} ({format_bytes(gpu.memory)}, capability {gpu.capability})" for gpu in machine.gpus) or "none"),
        ("compiler", machine.compiler or "none"),
        ("torch", machine.torch or "not installed"),
        ("Python", machine.python),
        ("system", machine.system),
        ("cache", f"{cache} ({format_bytes(_free(cache))} free{'' if _writable(cache) else ', NOT WRITABLE: set ARMILLARY_HOME'})"),
    ]
    if machine.rates is not None:
        threads = f"{machine.rates.threads} thread{'s' if machine.rates.threads != 1 else ''}"
        rows += [
            ("fp32 products", f"{format_rate(machine.rates.gemm, 'FLOP')} measured with {threads}: bounds prompts and large batches"),
            ("memory reads", f"{format_rate(machine.rates.memory_read)} measured with {threads}: bounds one conversation's tokens"),
        ]
    return rows


def _standing(path: Path) -> Path:
    """The nearest ancestor that exists: the cache is made at first use."""
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def _free(path: Path) -> int:
    return shutil.disk_usage(_standing(path)).free


def _writable(path: Path) -> bool:
    return os.access(_standing(path), os.W_OK | os.X_OK)
