"""How many instructions the two hottest kernels execute, beside the closed form and the time that the machine needs for them.

    python bench/counts.py            # int4: the prefill tile (16 rows) and the product of one row
    ARMILLARY_ISA=avx2 python bench/counts.py --formats int8

Counted exactly, by single-stepping `arm_multiply` (counts.cpp), as a difference over both n and k: what is left is the inner loop, whatever
the kernel is built of. Everything is per unit: 16 columns x 32 of k, by 16 rows in the prefill tile or by one row. An instruction count
alone is no time, so the rates of this machine's units are measured in the same run, and the slowest of them is the bound.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import limits
import torch
from table import markdown

from armillary.cluster.machine import describe
from armillary.core import native
from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.packed_weight import Format, PackedWeight

HERE = Path(__file__).resolve().parent
COLUMNS, GROUP = 16, 32  # of a unit
QUIET = 0.5
CLASSES = ("multiply", "convert", "other vector", "load only", "store", "prefetch", "scalar")


@dataclass(frozen=True)
class Kernel:
    name: str
    rows: int
    unit_rows: int  # rows of a unit


KERNELS = (Kernel("prefill tile", 64, 16), Kernel("one row", 1, 1))


@dataclass(frozen=True)
class Counts:
    """A unit's instructions by class, and how many of them read memory (prefetches too: they use the same ports)."""

    by_class: Mapping[str, float]
    loads: float

    @property
    def total(self) -> float:
        return sum(self.by_class.values())


def classify(mnemonic: str, operands: str) -> tuple[str, bool]:
    """An instruction's class, and whether it reads memory. AT&T syntax, as objdump prints it: the last operand is written."""
    memory = "(" in operands and not mnemonic.startswith(("lea", "nop"))
    writes = memory and operands.rstrip().endswith(")") and bool(re.match(r"v?p?mov|vextract|vcvtps2ph|push", mnemonic))
    if mnemonic.startswith("prefetch"):
        return "prefetch", True
    if not mnemonic.startswith("v"):
        return "scalar", memory and not writes
    if writes:
        return "store", False
    if re.match(r"vpdp|vpmadd|vf[n]?m|vmul|vdp", mnemonic):
        return "multiply", memory
    if mnemonic.startswith("vcvt"):
        return "convert", memory
    if memory and re.match(r"vmov|vp?broadcast|vlddqu|vpmov", mnemonic):
        return "load only", True
    return "other vector", memory


def closed_form(format: Format, unit_rows: int, wide: bool, dot: bool) -> dict[str, float]:
    """The instructions of a unit that the method cannot do without: `wide` is AVX-512, `dot` its byte dot product.

    For every row: 8 dot products of 4 bytes, the conversion to fp32, scale x scale, and a multiply-add; without `dot` also
    the widening product. For every tile of rows: the scale's conversion, and for int4 an `and`, a shift and an `and` for each 64 weights' bytes.
    """
    halves = 1 if wide else 2
    if format in ("fp32", "fp16"):
        return {"multiply": float(halves * GROUP * unit_rows)}
    widen = 0 if dot else 1
    multiply = halves * unit_rows * (8 + widen + 2)
    additions = 0 if dot else halves * unit_rows * (8 + 1)  # of 16-bit sums, and of the start value
    unpack = halves * 12 if format in ("int4", "int4m") else 0
    return {"multiply": float(multiply), "convert": float(halves * (unit_rows + 1)), "other vector": float(additions + unpack)}


def closed_loads(format: Format, unit_rows: int, wide: bool) -> float:
    """Loads of a unit: every row's 8 broadcasts of 4 activations, its start value and scale; the tile's weights and scale.

    fp32: the kernel's 8 rows x 48 columns take 8 broadcasts and 3 loads a step of k, a row alone 1 and 3.
    """
    halves = 1 if wide else 2
    if format in ("fp32", "fp16"):
        rows = min(8, unit_rows)
        return GROUP * (unit_rows / 3 + halves * unit_rows / rows)
    weights = 4 if format in ("int4", "int4m") else 8
    return float(unit_rows * 10 + halves * (weights + 1))


class Stepper:
    """Counts the instructions of a call of `arm_multiply`, by their place in the library."""

    def __init__(self) -> None:
        self.library = cpu_library.require()
        self.path = Path(self.library._name)
        # A signal's frame may not lie over data below the stack pointer.
        counter = native.load("bench_counts", [HERE / "counts.cpp"], (*native.FLAGS, "-mno-red-zone"))
        if counter is None:
            raise InputError("the counter cannot be compiled", "run `apt install g++`, on Linux and x86-64")
        self.count = counter.arm_count
        self.base, self.size = self._mapped()
        self.listing = self._disassemble()

    def _mapped(self) -> tuple[int, int]:
        spans = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(self.path))]
        first, last = min(int(start, 16) for start, _ in spans), max(int(end, 16) for _, end in spans)
        return first, last - first

    def _disassemble(self) -> dict[int, tuple[str, str]]:
        """Offset -> (mnemonic, operands)."""
        done = subprocess.run(["objdump", "-d", "--no-show-raw-insn", str(self.path)], capture_output=True, text=True, check=True)
        found = {}
        for line in done.stdout.splitlines():
            if match := re.match(r"\s*([0-9a-f]+):\s+(?:\{\w+\} )?(\S+)\s*(.*)", line):
                found[int(match[1], 16)] = (match[2], match[3].partition("#")[0].partition("<")[0])
        return found

    def multiply(self, weight: PackedWeight, x: torch.Tensor) -> Counter[int]:
        out = torch.empty(x.shape[0], weight.shape[0])
        counts = (ctypes.c_uint64 * self.size)()
        struct = weight.struct()
        arguments = (ctypes.byref(struct), ctypes.c_void_p(x.data_ptr()), x.shape[0], ctypes.c_void_p(out.data_ptr()))
        status = self.count(self.library.arm_multiply, *arguments, counts, ctypes.c_size_t(self.base), ctypes.c_size_t(self.size))
        if status:
            raise RuntimeError(
                "no signal handler can be set here" if status == -1 else "single-stepping stopped midway: the counts are short"
            )
        values = memoryview(counts).cast("B").cast("Q")
        return Counter({offset: values[offset] for offset in self.listing if values[offset]})

    def unit(self, format: Format, kernel: Kernel, n: int = 192, k: int = 128) -> Counts:
        """The inner loop's instructions a unit: what doubling both n and k adds over doubling each alone."""
        torch.manual_seed(0)
        total: Counter[int] = Counter()
        for columns, depth, sign in ((2 * n, 2 * k, 1), (n, 2 * k, -1), (2 * n, k, -1), (n, k, 1)):
            weight = PackedWeight([torch.rand(columns, depth) - 0.5], format)
            for offset, count in self.multiply(weight, torch.rand(kernel.rows, depth) - 0.5).items():
                total[offset] += sign * count
        units = (n // COLUMNS) * (k // GROUP) * (kernel.rows / kernel.unit_rows)
        by_class: Counter[str] = Counter()
        loads = 0
        for offset, count in total.items():
            name, reads = classify(*self.listing[offset])
            by_class[name] += count
            loads += count * reads
        return Counts({name: by_class[name] / units for name in CLASSES}, loads / units)


def bounds(counts: Counts, loops: Mapping[str, limits.Loop], threads: int) -> dict[str, float]:
    """Seconds that each resource of one core needs for a unit, at the rates measured with `threads` threads at once."""

    def rate(name: str) -> float:
        return loops[name].rate / threads

    return {
        "multiply": counts.by_class["multiply"] / rate("fma"),
        "load": counts.loads / rate("load"),
        "issue": counts.total / rate("any"),
    }


def fastest(run: Callable[[], object], seconds: float) -> float:
    taken: list[float] = []
    until = time.perf_counter() + seconds
    while len(taken) < 3 or time.perf_counter() < until:
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


class Timed:
    """Products on several threads at once, each with a weight of its own."""

    def __init__(self, format: Format, n: int, k: int, rows: int, threads: int) -> None:
        self.library = cpu_library.require()
        self.rows, self.k, self.units = rows, k, n // COLUMNS * (k // GROUP)
        self.format = format
        self.weights = [PackedWeight([torch.rand(n, k) - 0.5], format) for _ in range(threads)]
        self.structs = [weight.struct() for weight in self.weights]
        self.x = torch.rand(rows, k) - 0.5
        self.outs = [torch.empty(rows, n) for _ in range(threads)]
        padded, groups = -(-rows // 16) * 16, k // GROUP
        self.quantised = [
            (torch.empty(padded, k, dtype=torch.int8), torch.empty(padded, groups), torch.empty(padded, groups)) for _ in range(threads)
        ]

    @property
    def weight_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.weights)

    def seconds(self, pool: ThreadPoolExecutor, seconds: float) -> float:
        """Of the fastest round, less what quantising the rows took."""

        def multiply(index: int) -> None:
            pointers = ctypes.c_void_p(self.x.data_ptr()), self.rows, ctypes.c_void_p(self.outs[index].data_ptr())
            self.library.arm_multiply(ctypes.byref(self.structs[index]), *pointers)

        def quantise(index: int) -> None:
            buffers = (ctypes.c_void_p(tensor.data_ptr()) for tensor in self.quantised[index])
            self.library.arm_quantise_rows(ctypes.c_void_p(self.x.data_ptr()), self.rows, self.k, *buffers)

        threads = range(len(self.weights))
        whole = fastest(lambda: list(pool.map(multiply, threads)), seconds)
        if self.format in ("fp32", "fp16"):
            return whole
        return whole - fastest(lambda: list(pool.map(quantise, threads)), seconds / 4)


def measured(format: Format, kernel: Kernel, threads: int, seconds: float) -> tuple[float, float]:
    """(seconds of a unit on each thread, weight bytes of a unit)."""
    with ThreadPoolExecutor(threads) as pool:
        if kernel.rows == 1:  # far more weights than the caches hold, as in a model
            timed = Timed(format, 16384 // threads, 8192, 1, threads)
            return timed.seconds(pool, seconds) / timed.units, timed.weight_bytes / (timed.units * threads)
        # The difference between two depths leaves out what storing the result takes.
        short, long = (Timed(format, 1536, k, 512, threads) for k in (576, 1152))
        taken = long.seconds(pool, seconds) - short.seconds(pool, seconds)
        units = (long.units - short.units) * 512 / kernel.unit_rows
        return taken / units, (long.weight_bytes - short.weight_bytes) / threads / units


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=["fp32", "fp16", "int8", "int4", "int4m"], default=["int4"])
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="threads that multiply at once (default: all cores)"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time for each measurement")
    parser.add_argument("--publish", action="store_true", help="write bench/results/counts.md; wants a quiet machine")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    if load > QUIET:
        print(f"warning: the load average is {load:.2f}: counts are exact, times are not")
        if options.publish:
            return 2
    text = page(options, load)
    print(text)
    if options.publish:
        (HERE / "results").mkdir(exist_ok=True)
        (HERE / "results" / "counts.md").write_text(text)
    return 0


def page(options: argparse.Namespace, load: float) -> str:
    torch.set_num_threads(1)
    flags = set(cpu_library.flags())
    loops = limits.loops(options.threads)
    wide = any(loop.instruction.endswith("zmm") for loop in loops.values())
    dot = loops["dot"].instruction.startswith("vpdp")
    stepper = Stepper()
    cycle = loops["cycle"].rate / options.threads
    lines = [["a unit of", *CLASSES, "all", "of which read memory"]]
    times = [["a unit of", "multiply units", "load ports", "issue", "memory", "expected", "measured", "expected / measured"]]
    for format in options.formats:
        for kernel in KERNELS:
            counts = stepper.unit(format, kernel)
            name = f"{format}, {kernel.name}"
            form, loads = closed_form(format, kernel.unit_rows, wide, dot), closed_loads(format, kernel.unit_rows, wide)
            lines.append([name, *(f"{counts.by_class[c]:.1f}" for c in CLASSES), f"{counts.total:.1f}", f"{counts.loads:.1f}"])
            lines.append([f"{name}: closed form", *(f"{form[c]:.0f}" if c in form else "" for c in CLASSES), "", f"{loads:.0f}"])
            taken, weight_bytes = measured(format, kernel, options.threads, options.seconds)
            bound = bounds(counts, loops, options.threads)
            if kernel.rows == 1:
                size = int(weight_bytes * (16384 // COLUMNS) * (8192 // GROUP))
                bound["memory"] = weight_bytes / (limits.read_rate(options.threads, size) / options.threads)
            expected = max(bound.values())
            shown = [f"{bound[b] * 1e9:.2f}" if b in bound else "-" for b in ("multiply", "load", "issue", "memory")]
            times.append([name, *shown, f"{expected * 1e9:.2f}", f"{taken * 1e9:.2f}", f"{expected / taken:.2f}"])
    rates = ", ".join(f"{loop.instruction} {loop.rate / options.threads / cycle:.2f}" for name, loop in loops.items() if name != "cycle")
    isa = "native" if "-march=native" in flags else os.environ.get("ARMILLARY_ISA", "native")
    return (
        "\n\n".join(
            (
                "# Instructions of the hottest kernels",
                f"{describe().cpu}, {options.threads} threads, instruction set {isa}, load average {load:.2f}. {time.strftime('%Y-%m-%d')}.",
                "A unit is 16 columns x 32 of k, by 16 rows in the prefill tile and by one row else. Instructions, counted by single-stepping:",
                markdown(lines),
                "Nanoseconds of a unit on one core while all work; the expected time is the slowest resource alone:",
                markdown(times),
                f"Rates measured in this run, instructions a cycle of a core at {cycle / 1e9:.2f} GHz: {rates}.",
            )
        )
        + "\n"
    )


if __name__ == "__main__":
    sys.exit(main())
