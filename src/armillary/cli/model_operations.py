"""`armillary models show --batch`: the operations of a model for a batch and a layout, one device of each pipeline stage."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING

from armillary.core.errors import InputError

if TYPE_CHECKING:
    from armillary.models.graph.architecture import Architecture
    from armillary.models.graph.layout import Layout
    from armillary.models.graph.work import Work
    from armillary.sim.operation import Operation

_PART = re.compile(r"(?:([0-9]{1,7})x)?([0-9]{1,9})(?:@([0-9]{1,9}))?", re.ASCII)
_DEGREES = {"tp": "tensor_parallel", "pp": "pipeline_parallel", "ep": "expert_parallel", "dp": "data_parallel"}
_MAX_SEQUENCES = 1_000_000


def parse_batch(text: str) -> list[tuple[int, int]]:
    """(query, cached) pairs of `512,64x1@1000`. Raises InputError for anything else."""
    sequences: list[tuple[int, int]] = []
    for part in text.replace(" ", "").split(","):
        match = _PART.fullmatch(part)
        if match is None or int(match[2]) < 1 or len(sequences) + int(match[1] or 1) > _MAX_SEQUENCES:
            raise InputError(
                f"{part[:40]!r} is not a part of a batch of up to {_MAX_SEQUENCES:,} sequences",
                "write [COUNTx]TOKENS[@CACHED], such as 512 or 64x1@1000",
                field="batch",
            )
        sequences += [(int(match[2]), int(match[3] or 0))] * int(match[1] or 1)
    if not sequences:
        raise InputError(f"the batch {text[:40]!r} has no sequence", "write [COUNTx]TOKENS[@CACHED] with a count over 0", field="batch")
    return sequences


def parse_layout(text: str) -> Layout:
    """A layout from `tp=8,pp=2,sp`. Raises InputError for anything else."""
    from armillary.models.graph.layout import Layout

    parts = [part for part in text.replace(" ", "").split(",") if part]
    degrees: dict[str, int] = {}
    for part in parts:
        name, _, degree = part.partition("=")
        if name in _DEGREES and re.fullmatch("[0-9]{1,6}", degree, re.ASCII):
            degrees[_DEGREES[name]] = int(degree)
        elif part not in ("sp", "ba"):
            raise InputError(f"{part[:40]!r} is not a part of a layout", "write tp=N, pp=N, ep=N, dp=N, sp or ba", field="layout")
    return Layout(**degrees, sequence_parallel="sp" in parts, batch_attention="ba" in parts)


def print_operations(model: str, batch: str | None, layout: str | None, formats: tuple[str, str, str], json: bool) -> None:
    """The model's size and, with a batch, a table of operations for each different pipeline stage."""
    from armillary.cli.terminal import print_json, table
    from armillary.models.graph.find import find
    from armillary.models.graph.precision import Precision
    from armillary.models.graph.work import Work
    from armillary.sim.operation import total

    precision, spread = Precision(*formats), parse_layout(layout or "")
    sequences = None if batch is None else parse_batch(batch)
    architecture = find(model)
    works = [Work(architecture, spread, precision, stage) for stage in range(spread.pipeline_parallel)]
    listed = [] if sequences is None else [work.operations(work.batch(sequences)) for work in works]
    facts = _facts(architecture, works)
    if json:
        stages = [{"operations": [asdict(operation) for operation in stage], "total": asdict(total(stage))} for stage in listed]
        print_json({**facts, "precision": asdict(precision), "layout": asdict(spread), "stages": stages})
        return
    table(("", ""), [(name.replace("_", " "), _words(name, value)) for name, value in facts.items()])
    for stage_range, stage in _alike(listed):
        where = f", {stage_range}" if spread.pipeline_parallel > 1 else ""
        table(_COLUMNS, [*map(_row, stage), _total_row(stage)], title=f"\nOne device{where}, one repetition a line:")


def print_published(json: bool) -> None:
    """All architectures of the table, with their counts and sources."""
    from armillary.cli.terminal import print_json, table
    from armillary.core.units import format_bytes, format_count
    from armillary.models.graph.parameters import active_parameters, kv_bytes_per_token, parameters
    from armillary.models.graph.published import published

    counted = [
        (known, parameters(known.architecture), active_parameters(known.architecture), kv_bytes_per_token(known.architecture))
        for known in published().values()
    ]
    if json:
        print_json(
            [
                {
                    "name": known.architecture.name,
                    "parameters": all_of_them,
                    "active_parameters": active,
                    "kv_bytes_per_token": kv,
                    "context": known.architecture.max_context,
                    "confirmed": known.confirmed,
                    "source": known.source,
                }
                for known, all_of_them, active, kv in counted
            ]
        )
        return
    table(
        ("name", "parameters", "a token passes", "KV a token, fp16", "context", "source"),
        [
            (
                known.architecture.name,
                format_count(all_of_them),
                format_count(active),
                format_bytes(kv),
                f"{known.architecture.max_context:,}",
                known.source if known.confirmed else f"unconfirmed: {known.source}",
            )
            for known, all_of_them, active, kv in counted
        ],
    )


def _facts(model: Architecture, works: Sequence[Work]) -> dict[str, object]:
    from armillary.models.graph.parameters import active_parameters, parameters

    return {
        "model": model.name,
        "parameters": parameters(model),
        "parameters_a_token_passes": active_parameters(model),
        "layers": model.num_layers,
        "devices": works[0].layout.devices,
        "weight_bytes_of_a_device": max(work.weight_bytes for work in works),
        "kv_bytes_per_token_of_a_device": max(work.kv_bytes_per_token for work in works),
    }


def _words(name: str, value: object) -> str:
    from armillary.core.units import format_bytes

    if not isinstance(value, int):
        return str(value)
    return format_bytes(value) if "bytes" in name else f"{value:,}"


_COLUMNS = ("operation", "kind", "times", "m x n x k", "FLOPs", "weights", "KV", "activations", "FLOP/B", "message", "ranks")


def _alike(stages: Sequence[list[Operation]]) -> list[tuple[str, list[Operation]]]:
    """Neighbouring stages that do the same, as one."""
    out, first = [], 0
    for stage, group in groupby(stages):
        last = first + len(list(group)) - 1
        out.append((f"stage {first}" if first == last else f"stages {first} to {last}", stage))
        first = last + 1
    return out


def _row(operation: Operation) -> tuple[str, ...]:
    from armillary.core.units import format_bytes, format_flops

    def or_none(text: str, there: int) -> str:
        return text if there else ""

    shape = f"{operation.m} x {operation.n} x {operation.k}" if operation.n else str(operation.m or "")
    return (
        operation.name,
        operation.kind.value,
        str(operation.repeat),
        f"{operation.matrices} of {shape}" if operation.matrices > 1 else shape,
        or_none(format_flops(operation.flops), operation.flops),
        or_none(format_bytes(operation.weight_bytes), operation.weight_bytes),
        or_none(format_bytes(operation.kv_bytes), operation.kv_bytes),
        or_none(format_bytes(operation.read_bytes + operation.write_bytes), operation.read_bytes + operation.write_bytes),
        or_none(f"{operation.intensity:.1f}", operation.flops),
        or_none(format_bytes(operation.message_bytes), operation.message_bytes),
        f"{operation.ranks} {operation.axis.value}" if operation.axis else "",
    )


def _total_row(stage: Sequence[Operation]) -> tuple[str, ...]:
    from armillary.core.units import format_bytes, format_flops
    from armillary.sim.operation import total

    sums = total(stage)
    return (
        "all, repetitions counted",
        "",
        "",
        "",
        format_flops(sums.flops),
        format_bytes(sums.weight_bytes),
        format_bytes(sums.kv_bytes),
        format_bytes(sums.read_bytes + sums.write_bytes),
        f"{sums.intensity:.1f}",
        format_bytes(sums.message_bytes),
        f"{sums.messages} messages",
    )
