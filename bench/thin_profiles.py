"""Makes the packaged tables of measured operations from the Vidur project's profiles: medians, on as few points as linear interpolation needs.

    python bench/thin_profiles.py FOLDER [DESTINATION]

FOLDER has `a100_Llama-2-7b-hf_mlp.csv`, `a100_dgx_all_reduce.csv`, `a100_dgx_send_recv.csv` and the like, as in microsoft/vidur under
data/profiling (MIT licence). A point is kept while leaving it out would make an operation, or all of a layer's together, wrong by more
than `TOLERANCE` of the layer's time. Collectives, which are measured with a few repetitions, are smoothed by running medians first.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.04  # of a layer's time
SMOOTHED, LOOSE = 9, 0.08  # sizes a running median takes in; tolerance of a collective
SHAPE = ("n_head", "n_kv_head", "n_embd", "n_expanded_embd", "use_gated_mlp")
ROOT = Path(__file__).parents[1] / "src/armillary/sim/costs/profiles"
Floats = NDArray[np.float64]


def thinned(x: Floats, curves: Floats, whole: Floats, tolerance: float) -> tuple[list[int], float, float]:
    """Which points to keep, and the largest and median error of the curves' sum. [points], [curves, points], [points]"""
    keep, every = [0, len(x) - 1], np.vstack([curves, curves.sum(axis=0)])
    while True:
        error = np.abs(np.array([np.interp(x, x[keep], curve[keep]) for curve in every]) - every) / whole
        worst = error.max(axis=0)
        if worst.max() <= tolerance:
            return keep, float(error[-1].max()), float(np.median(error[-1]))
        keep = sorted({*keep, int(worst.argmax())})


def medians(rows: Sequence[dict[str, str]], at: str, columns: Sequence[str]) -> tuple[Floats, Floats]:
    """x [points] and each column's median there [columns, points]: a few points were measured twice."""
    found: dict[float, list[list[float]]] = defaultdict(list)
    for row in rows:
        found[float(row[at])].append([float(row[name]) for name in columns])
    x = np.array(sorted(found))
    return x, np.array([np.median(found[one], axis=0) for one in x]).T


def layers(source: Path, target: Path) -> None:
    rows = list(csv.DictReader(source.open()))
    columns = [name for name in rows[0] if name.startswith("time_stats.") and name.endswith(".median")]
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*columns, *SHAPE, "num_tokens", "num_tensor_parallel_workers"])
        for degree in sorted({int(row["num_tensor_parallel_workers"]) for row in rows}):
            mine = [row for row in rows if int(row["num_tensor_parallel_workers"]) == degree]
            x, curves = medians(mine, "num_tokens", columns)
            keep, most, usual = thinned(x, curves, curves.sum(axis=0), TOLERANCE)
            for place in keep:
                values = [f"{value:.4g}" for value in curves[:, place]]
                writer.writerow([*values, *(mine[0][name] for name in SHAPE), int(x[place]), degree])
            print(
                f"{target.name}, {degree} devices: {len(keep)} of {len(x)} points, error at most {100 * most:.1f} %, median {100 * usual:.2f} %"
            )


def collectives(source: Path, target: Path, name: str) -> None:
    rows = list(csv.DictReader(source.open()))
    column = f"time_stats.{name}.median"
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([column, "num_workers", "size", "collective", "devices_per_node"])
        for workers, each in sorted({(int(row["num_workers"]), int(row["devices_per_node"])) for row in rows}):
            mine = [row for row in rows if (int(row["num_workers"]), int(row["devices_per_node"])) == (workers, each)]
            x, curves = medians(mine, "size", [column])
            padded = np.pad(curves[0], SMOOTHED // 2, mode="edge")
            smooth = np.median(np.lib.stride_tricks.sliding_window_view(padded, SMOOTHED), axis=1)
            keep, most, usual = thinned(x, smooth[None], smooth, LOOSE)
            for place in keep:
                writer.writerow([f"{smooth[place]:.4g}", workers, int(x[place]), name, each])
            print(
                f"{target.name}, {workers} devices, {each} a node: {len(keep)} of {len(x)} points, error at most {100 * most:.1f} %, "
                f"median {100 * usual:.2f} % of the running median"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("destination", type=Path, nargs="?", default=ROOT)
    options = parser.parse_args()
    for device in ("a100", "h100"):
        for model in ("7b", "70b"):
            layers(options.folder / f"{device}_Llama-2-{model}-hf_mlp.csv", options.destination / f"{device}_llama-2-{model}.csv")
        for name in ("all_reduce", "send_recv"):
            collectives(options.folder / f"{device}_dgx_{name}.csv", options.destination / f"{device}_{name}.csv", name)


if __name__ == "__main__":
    main()
