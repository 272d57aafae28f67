"""Measured times of a model's operations, from CSV files in the shape of the Vidur project's profiles; a few are packaged."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from armillary.core.errors import FormatError, InputError
from armillary.core.units import MS

MOST: Final = 1_000_000  # lines of a file
PACKAGED: Final = {"a100": "a100-80g-sxm", "h100": "h100-sxm"}
"""The packaged profiles, and the device of the catalogue that each was measured on; provenance in `profiles/SOURCE.md`."""
OPERATIONS: Final = {
    "embed": ("emb",),
    "norm": ("input_layernorm", "post_attention_layernorm"),
    "qkv": ("attn_pre_proj",),
    "rope": ("attn_rope",),
    "o": ("attn_post_proj",),
    "gate_up": ("mlp_up_proj",),
    "activation": ("mlp_act",),
    "down": ("mlp_down_proj",),
    "add": ("add",),
}
"""What `models/graph` calls an operation, and the columns of a file that measure it (the mean of them, where there are several)."""
COLLECTIVES: Final = {"all_reduce": "all_reduce", "send": "send_recv"}
_SHAPE: Final = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd")


@dataclass(frozen=True, slots=True)
class Curve:
    """ns at rising sizes (tokens, bytes); between them in proportion, beyond the last as the last is a unit. [points] each."""

    sizes: NDArray[np.float64]
    ns: NDArray[np.float64]

    def at(self, size: float) -> float:
        if size > self.sizes[-1]:
            return float(self.ns[-1] * size / self.sizes[-1])
        return float(np.interp(size, self.sizes, self.ns))


Shape = tuple[int, int, int, int]
"""Heads, key/value heads, hidden size, intermediate size of a decoder with a gated MLP."""


@dataclass(frozen=True, slots=True)
class Profile:
    """`layers`: by a decoder's shape, tensor-parallel degree and operation, ns of one by tokens. `collectives`: by name (all_reduce, send),
    ranks and ranks in one node, ns by bytes."""

    name: str
    layers: Mapping[Shape, Mapping[int, Mapping[str, Curve]]] = field(default_factory=dict)
    collectives: Mapping[tuple[str, int, int], Curve] = field(default_factory=dict)


@cache
def packaged(name: str) -> Profile:
    """`a100` or `h100`: Llama-2 7B and 70B over 1 to 8 devices, and the collectives of a DGX."""
    folder = resources.files("armillary.sim.costs").joinpath("profiles")
    files = [one for one in folder.iterdir() if one.name.startswith(f"{name}_")]
    return _merged(name, (_read(one.name, one.read_text("utf-8").splitlines()) for one in sorted(files, key=lambda one: one.name)))


def profile(text: str) -> Profile:
    """By the name of a packaged one, or of CSV files, separated by commas. Raises InputError and FormatError."""
    if text.strip().lower() in PACKAGED:
        return packaged(text.strip().lower())
    read = []
    for path in (Path(part.strip()) for part in text.split(",")):
        if not path.is_file():
            raise InputError(
                f"{str(path)[:200]!r} is neither a packaged profile nor a file",
                f"give {', '.join(PACKAGED)}, or CSV files separated by commas",
                field="profile",
            )
        with path.open(newline="", encoding="utf-8") as file:
            read.append(_read(str(path), file))
    return _merged(text, read)


def _merged(name: str, parts: Iterable[Profile]) -> Profile:
    layers: dict[Shape, Mapping[int, Mapping[str, Curve]]] = {}
    collectives: dict[tuple[str, int, int], Curve] = {}
    for part in parts:
        layers.update(part.layers)
        collectives.update(part.collectives)
    return Profile(name, layers, collectives)


def _read(name: str, lines: Iterable[str]) -> Profile:
    """One file: a model's operations, or a collective."""
    rows = csv.DictReader(lines)
    columns = set(rows.fieldnames or ())
    for own, theirs in COLLECTIVES.items():
        if (column := f"time_stats.{theirs}.median") in columns:
            return Profile(name, {}, _collectives(name, rows, own, column))
    needed = {f"time_stats.{part}.median" for parts in OPERATIONS.values() for part in parts}
    missing = sorted({*needed, *_SHAPE, "num_tokens", "num_tensor_parallel_workers"} - columns)
    if missing:
        raise FormatError(
            f"{name} has no column {missing[0]!r}", "a profile has the columns of Vidur's mlp.csv, all_reduce.csv or send_recv.csv"
        )
    return Profile(name, _layers(name, rows))


def _layers(name: str, rows: Iterable[Mapping[str, str]]) -> Mapping[Shape, Mapping[int, Mapping[str, Curve]]]:
    points: dict[tuple[Shape, int], dict[int, list[list[float]]]] = defaultdict(lambda: defaultdict(list))
    for place, row in enumerate(rows, 2):
        if row.get("use_gated_mlp", "True") != "True":
            raise FormatError(f"line {place} of {name} is of an MLP without a gate", "profiles of gated decoders are read")
        heads, kv_heads, hidden, inner, tokens, degree = _whole(name, place, row, (*_SHAPE, "num_tokens", "num_tensor_parallel_workers"))
        values = [
            sum(_number(name, place, row, f"time_stats.{part}.median") for part in parts) / len(parts) for parts in OPERATIONS.values()
        ]
        points[(heads, kv_heads, hidden, inner), degree][tokens].append(values)
    if not points:
        raise FormatError(f"{name} has no measurements", "a profile has a line for each")
    found: dict[Shape, dict[int, Mapping[str, Curve]]] = defaultdict(dict)
    for (shape, degree), by_tokens in points.items():
        sizes = sorted(by_tokens)
        ns = np.array([np.median(by_tokens[size], axis=0) for size in sizes]).T * MS
        found[shape][degree] = {one: Curve(np.array(sizes, dtype=np.float64), ns[index]) for index, one in enumerate(OPERATIONS)}
    return dict(found)


def _collectives(name: str, rows: Iterable[Mapping[str, str]], own: str, column: str) -> Mapping[tuple[str, int, int], Curve]:
    points: dict[tuple[int, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for place, row in enumerate(rows, 2):
        ranks, each, size = _whole(name, place, row, ("num_workers", "devices_per_node", "size"))
        points[ranks, each][size].append(_number(name, place, row, column))
    if not points:
        raise FormatError(f"{name} has no measurements", "a profile has a line for each")
    found = {}
    for (ranks, each), by_size in points.items():
        sizes = sorted(by_size)
        ns = np.array([np.median(by_size[size]) for size in sizes]) * MS
        found[own, ranks, each] = Curve(np.array(sizes, dtype=np.float64), ns)
    return found


def _whole(name: str, place: int, row: Mapping[str, str], columns: Sequence[str]) -> tuple[int, ...]:
    values = tuple(_number(name, place, row, column) for column in columns)
    if not all(value.is_integer() and value >= 1 for value in values):
        raise FormatError(f"line {place} of {name}: {dict(zip(columns, values, strict=True))}", "counts are whole and at least 1")
    return tuple(int(value) for value in values)


def _number(name: str, place: int, row: Mapping[str, str], column: str) -> float:
    if place > MOST:
        raise FormatError(f"{name} has more than {MOST:,} lines", "thin it out")
    try:
        value = float(row[column])
    except (KeyError, TypeError, ValueError):
        value = math.nan
    if not 0 <= value < 1e15:
        raise FormatError(f"line {place} of {name}: {column} is {row.get(column)!r}", "give milliseconds, 0 or more")
    return value
