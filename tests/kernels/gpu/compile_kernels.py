"""Run by test_compile.py: compiles what the wrappers would launch, for GPUs that are not here; prints one JSON line a kernel.

The launches are recorded, not written down again: the kernels' names in the modules are replaced by recorders, so a wrapper that
passes another argument or another schedule compiles another kernel. Usage: compile_kernels.py TARGET [CASE...].
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from armillary.kernels.attention import AttentionSpec
from armillary.kernels.gpu import paged_attention, quantised_linear
from armillary.kernels.paged_attention import PagedCache, Span

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class Launch:
    kernel: Any
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    options: dict[str, int]


class Recorder:
    """Stands where a kernel stands; what it is called with goes to `launches` and nothing runs."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def record(*arguments: Any, **named: Any) -> None:
            options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
            self.launches.append(Launch(self.kernel, arguments, named, options))

        return record


@contextlib.contextmanager
def recorded() -> Iterator[list[Launch]]:
    launches: list[Launch] = []
    kernels = [(paged_attention, "_attend"), (paged_attention, "_merge"), (quantised_linear, "_gemv"), (quantised_linear, "_gemm")]
    originals = [getattr(module, name) for module, name in kernels]
    for (module, name), kernel in zip(kernels, originals, strict=True):
        setattr(module, name, Recorder(kernel, launches))
    real = paged_attention.processors, quantised_linear.processors, paged_attention.operand, quantised_linear.operand
    try:
        for module in (paged_attention, quantised_linear):
            module.processors = lambda device: 132  # type: ignore[attr-defined]
            module.operand = lambda dtype, kernel: getattr(triton.language, str(dtype).removeprefix("torch."))  # type: ignore[attr-defined]
        yield launches
    finally:
        paged_attention.processors, quantised_linear.processors, paged_attention.operand, quantised_linear.operand = real
        for (module, name), kernel in zip(kernels, originals, strict=True):
            setattr(module, name, kernel)


def compile_launch(launch: Launch, target: GPUTarget) -> dict[str, Any]:
    """What the just-in-time compiler would compile: pointers and sizes that are multiples of 16 are known to be."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = launch.constants[parameter.name]
            continue
        value = launch.arguments[index]
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=target, options=launch.options)
    found = {"kernel": launch.kernel.__name__, "shared": compiled.metadata.shared, "warps": compiled.metadata.num_warps}
    if target.backend == "hip":
        return found | {"binary": len(compiled.asm["hsaco"]), "matrix": sorted(set(re.findall(r"v_mfma", compiled.asm["amdgcn"])))}
    return found | usage(compiled.asm["cubin"]) | {"matrix": sorted(set(re.findall(r"wgmma|mma\.sync", compiled.asm["ptx"])))}


def usage(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of stack (where spilled registers go), as cuobjdump reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def attention(dtype: torch.dtype, heads: tuple[int, int], head_dim: int, spans: list[tuple[int, int]], **spec: Any) -> None:
    cache = PagedCache(1, sum(-(-(start + count) // 16) for start, count in spans), 16, heads[1], head_dim, dtype)
    blocks = iter(range(cache.num_blocks))
    batch = [Span(start, count, [next(blocks) for _ in range(-(-(start + count) // 16))]) for start, count in spans]
    q = torch.zeros(sum(count for _, count in spans), heads[0], head_dim, dtype=dtype)
    paged_attention.GpuPagedAttend(cache, batch).attend(AttentionSpec(0, 0.125, **spec), q)


def linear(dtype: torch.dtype, format: quantised_linear.Format, m: int, n: int = 2048, k: int = 2048) -> None:
    weight = quantised_linear.quantise(torch.zeros(n, k), format)
    quantised_linear.quantised_linear(torch.zeros(m, k, dtype=dtype), weight)


BOTH = [(2000, 1), (100, 64)]  # a decode row whose keys are split, and a chunk
HALF, BRAIN, FULL = torch.float16, torch.bfloat16, torch.float32
CASES: dict[str, Callable[[], None]] = {
    "attention-fp16-64": lambda: attention(HALF, (9, 3), 64, BOTH),
    "attention-bf16-128": lambda: attention(BRAIN, (32, 8), 128, BOTH),
    "attention-bf16-256-window-softcap": lambda: attention(BRAIN, (8, 4), 256, BOTH, window=512, softcap=50.0),
    "attention-fp32-128": lambda: attention(FULL, (8, 2), 128, BOTH),
    "attention-fp32-256": lambda: attention(FULL, (2, 2), 256, BOTH),
    "attention-fp16-80-shared-by-71": lambda: attention(HALF, (71, 1), 80, BOTH),
} | {
    f"linear-{name}-{format}-{m}": lambda dtype=dtype, format=format, m=m: linear(dtype, format, m)
    for name, dtype, formats in (("fp16", HALF, ("int8", "int4m")), ("bf16", BRAIN, ("int4",)))
    for format in formats
    for m in (1, 4, 16, 256)
}


def main() -> None:
    target = TARGETS[sys.argv[1]]
    for name in sys.argv[2:] or CASES:
        with recorded() as launches:
            CASES[name]()
        for launch in launches:
            print(json.dumps({"case": name, "target": sys.argv[1]} | compile_launch(launch, target)), flush=True)


if __name__ == "__main__":
    main()
