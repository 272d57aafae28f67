"""How quickly a model starts: laying its weights out against reading them as kept, and what mapping instead of reading would cost.

    python bench/start.py [smollm2]      (wants a quiet machine; the model's file should be in the page cache)

Decision 9 rests on these numbers.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from armillary.core.paths import cache_dir
from armillary.core.units import format_bytes
from armillary.kernels.packed_file import PackedFile, write
from armillary.kernels.packed_weight import Arena, Format, PackedWeight
from armillary.models.load import load
from armillary.serve.executors.packed_model import LaidOut, Quantisation, step_model

QUANTISATIONS: tuple[Quantisation, ...] = ("int4", "int8", "fp16", "none")
STREAMED: tuple[tuple[Format, int], ...] = (("int4", 1 << 19), ("fp32", 1 << 16))  # rows of 1,536: some 450 MB, past any cache
REPEATS = 5


def best(what: Callable[[], object], repeats: int = REPEATS) -> float:
    """Seconds of the fastest of a few."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        what()
        times.append(time.perf_counter() - begin)
    return min(times)


def starts(model: str, path: Path) -> None:
    loading = best(lambda: load(model), 2)
    loaded = load(model)
    print(
        f"{model}: {format_bytes(sum(file.size for file in loaded.weights.files))} in files, opened with its tokenizer in {loading:.3f} s"
    )
    for quantisation in QUANTISATIONS:
        parts = LaidOut(loaded.weights, quantisation)
        step_model(loaded.config, parts)
        laying = best(lambda quantisation=quantisation: step_model(loaded.config, LaidOut(loaded.weights, quantisation)))
        writing = best(lambda parts=parts: write(path, parts.made.arrays, {}), 2)
        reading = best(lambda: PackedFile.open(path).load(Arena()))
        size = format_bytes(path.stat().st_size)
        print(
            f"  {quantisation:5} {size:>9}: laid out {laying:.3f} s, written {writing:.3f} s, read {reading:.3f} s ({laying / reading:.1f}x)"
        )


def streams(path: Path) -> None:
    """The same weight from the arena's huge pages and from the mapped file: one thread, one row, alternating."""
    x = torch.randn(1, 1536)
    for format, rows in STREAMED:
        weight = PackedWeight([torch.randn(rows, 1536)], format)
        write(path, weight.arrays(), {})
        shape = weight.shape
        del weight
        file = PackedFile.open(path)
        with path.open("rb") as opened:
            mapped = torch.frombuffer(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
        arrays = file.load(Arena())
        begin = path.stat().st_size - file.nbytes
        ways = {"arena": PackedWeight.restore(format, shape, arrays)}
        first = next(iter(arrays.values())).data_ptr()
        at = {name: begin + array.data_ptr() - first for name, array in arrays.items()}
        views = {name: mapped[at[name] : at[name] + a.nbytes].view(a.dtype).view(a.shape) for name, a in arrays.items()}
        ways["mapped"] = PackedWeight.restore(format, shape, views)
        times = dict.fromkeys(ways, float("inf"))
        for _ in range(4 * REPEATS):
            for name, way in ways.items():
                times[name] = min(times[name], best(lambda way=way: way.multiply(x), 1))
        rates = ", ".join(f"{name} {ways[name].nbytes / seconds / 1e9:.1f} GB/s" for name, seconds in times.items())
        print(f"  {format} streamed: {rates} (arena {times['mapped'] / times['arena']:.2f}x)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    model = parser.parse_args().model
    print(f"load average {os.getloadavg()[0]:.2f}, {torch.get_num_threads()} threads")
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as folder:
        starts(model, Path(folder) / "packed")
        streams(Path(folder) / "packed")


if __name__ == "__main__":
    main()
