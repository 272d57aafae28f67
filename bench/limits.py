"""What this machine can do at most, measured in the bench's own run, and what that bounds a case to (the roofline of Williams et al. 2009).

Arithmetic: a loop of multiply-adds, or of byte dot products, that holds everything in registers. Memory: a long read on huge pages, of
as many bytes as the weights have, for a smaller buffer stays in the caches in part. No program is above either.
"""

from __future__ import annotations

import ctypes
import functools
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from peers.workload import MARK, Case

from armillary.core import native
from armillary.core.errors import MissingDependencyError
from armillary.kernels import cpu_library
from armillary.models.config import ModelConfig

SOURCE = Path(__file__).resolve().parent / "limits.cpp"
# Bits a weight in memory, with the fp16 scale of a group of 32, and bytes of a key's or value's element, of our variants.
WEIGHT_BITS: Mapping[str, float] = {"fp32": 32.0, "fp16": 16.0, "int8": 8.5, "int4": 4.5}
KV_BYTES: Mapping[str, int] = {"fp32": 4, "fp16": 2, "int8": 2, "int4": 2}


@dataclass(frozen=True)
class Limits:
    """All threads together."""

    fma: float  # fp32 FLOP/s
    dot: float  # operations/s of byte dot products, two a product; 0 where there is no such instruction
    dot_instruction: str
    reads: tuple[tuple[int, float], ...]  # (bytes read over and over, bytes/s)

    def read(self, size: float) -> float:
        """Bytes/s for a buffer of about `size` bytes."""
        return min(self.reads, key=lambda found: abs(found[0] - size))[1]


@dataclass(frozen=True)
class Bound:
    """The most tokens a second of a case, and what sets it."""

    speed: float
    by: str  # memory | arithmetic


def bound(case: Case, config: ModelConfig, limits: Limits, variant: str, weight_bytes: int | None = None) -> Bound:
    """Arithmetic and memory traffic overlap perfectly, nothing else costs. Attention is fp32 arithmetic in every variant."""
    head = config.vocab_size * config.hidden_size
    body = config.parameters() - head * (1 if config.tie_embeddings else 2)
    weights = weight_bytes or (body + head) * WEIGHT_BITS[variant] / 8
    kv = config.kv_bytes_per_token(KV_BYTES[variant])
    product_rate = limits.dot if variant in ("int8", "int4") and limits.dot else limits.fma

    def attention(start: int, end: int) -> float:
        """FLOPs of queries at positions start..end-1, each seeing itself and all before it."""
        pairs = (end * (end + 1) - start * (start + 1)) / 2
        return 4 * config.num_layers * config.num_heads * config.head_dim * pairs

    requests = [(len(prompt), new) for prompt, new in zip(case.prompts, case.new, strict=True)]
    products = attended = read = 0.0
    tokens = case.prompt_tokens if case.kind == "prefill" else sum(case.new) if case.kind == "offline" else sum(new - 1 for new in case.new)
    if case.kind != "decode":
        products += sum(2 * body * prompt + 2 * head for prompt, _ in requests)
        attended += sum(attention(0, prompt) for prompt, _ in requests)
        read += weights
    if case.kind != "prefill":
        products += sum(2 * (body + head) * (new - 1) for _, new in requests)
        attended += sum(attention(prompt, prompt + new - 1) for prompt, new in requests)
        read += weights * (max(case.new) - 1) + kv * sum(prompt * (new - 1) + new * (new - 1) / 2 for prompt, new in requests)
    arithmetic, memory = products / product_rate + attended / limits.fma, read / limits.read(weights)
    return Bound(tokens / max(arithmetic, memory), "memory" if memory > arithmetic else "arithmetic")


@functools.cache
def library() -> ctypes.CDLL:
    """The measuring loops, compiled for this machine. Raises MissingDependencyError without a compiler."""
    lib = native.load("bench_limits", [SOURCE], cpu_library.flags())
    if lib is None:
        raise MissingDependencyError("the bench's loops cannot be compiled", "run `apt install g++`, and unset ARMILLARY_NATIVE")
    lib.arm_loop_name.restype = lib.arm_loop_instruction.restype = ctypes.c_char_p
    lib.arm_loop_ops.restype = lib.arm_loop_rate.restype = lib.arm_limit_read.restype = ctypes.c_double
    lib.arm_loop_rate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_double]
    lib.arm_limit_read.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_double]
    return lib


@dataclass(frozen=True)
class Loop:
    """A loop of one instruction, or of two in turn."""

    instruction: str
    rate: float  # instructions a second
    ops: float  # operations an instruction does


def loops(threads: int, seconds: float = 1.0) -> dict[str, Loop]:
    """The loops that this machine has, each measured for `seconds`."""
    lib, found, index = library(), {}, 0
    while name := lib.arm_loop_name(index):
        rate = lib.arm_loop_rate(index, threads, seconds)
        found[name.decode()] = Loop(lib.arm_loop_instruction(index).decode(), rate, lib.arm_loop_ops(index))
        index += 1
    return found


def read_rate(threads: int, size: int, seconds: float = 3.0) -> float:
    """Bytes/s read from a buffer of `size` bytes on huge pages."""
    rate = library().arm_limit_read(threads, size, seconds)
    if rate < 0:
        raise MemoryError(f"no memory for a buffer of {size:,} bytes")
    return float(rate)


def measure(threads: int, parameters: int) -> Limits:
    """The limits for a model of so many parameters, in about a quarter of a minute."""
    found = loops(threads)
    fma, dot = found.get("fma"), found.get("dot")
    if fma is None:
        raise MissingDependencyError("this machine has no AVX2: the bench knows no limit of its arithmetic", "run it on x86-64 with AVX2")
    sizes = sorted({int(parameters * bits / 8) for bits in WEIGHT_BITS.values()})
    return Limits(
        fma=fma.rate * fma.ops,
        dot=dot.rate * dot.ops if dot else 0.0,
        dot_instruction=dot.instruction if dot else "none",
        reads=tuple((size, read_rate(threads, size)) for size in sizes),
    )


def parse(raw: Mapping[str, object]) -> Limits:
    return Limits(**{**raw, "reads": tuple((int(size), float(rate)) for size, rate in raw["reads"])})  # type: ignore[arg-type, attr-defined]


if __name__ == "__main__":
    sys.stdout.write(f"\n{MARK}{json.dumps(asdict(measure(int(sys.argv[1]), int(sys.argv[2]))))}\n")
