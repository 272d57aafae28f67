"""This machine: cores, instruction sets, memory, limits, GPUs, compiler, and what all of it means for speed."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from armillary.cluster.cgroup import cgroup_limits
from armillary.cluster.measure import Rates, measure
from armillary.core import native
from armillary.core.cpu import cpu_info
from armillary.core.errors import ArmillaryError
from armillary.core.units import GB, format_bytes

ISA: Final = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "amx_tile", "amx_int8", "amx_bf16", "asimd", "sve", "sve2", "bf16", "i8mm",
)  # fmt: skip
"""Instruction sets that decide a kernel's speed, by Linux's names; the last five are Arm's."""


@dataclass(frozen=True, slots=True)
class GPU:
    name: str
    memory: int  # bytes
    capability: str  # CUDA's, such as "9.0"


@dataclass(frozen=True, slots=True)
class Machine:
    """What computation can run on here. Sizes in bytes; None is "unknown" or "no limit"; `rates` is None until measured."""

    system: str
    python: str
    torch: str | None
    cpu: str
    physical_cores: int
    logical_cores: int
    allowed_cores: int  # logical cores that this process may run on (its affinity)
    cpu_limit: float | None  # the control group's, in cores
    isa: tuple[str, ...]
    memory_total: int | None
    memory_available: int | None
    memory_limit: int | None  # the control group's
    gpus: tuple[GPU, ...]
    compiler: str | None
    rates: Rates | None = None

    @property
    def usable_cores(self) -> float:
        """Cores' worth of CPU time that this process can get."""
        return float(self.allowed_cores) if self.cpu_limit is None else min(float(self.allowed_cores), self.cpu_limit)

    @property
    def usable_memory(self) -> int | None:
        """Bytes that can be allocated at most, by the system's word and the control group's."""
        known = [size for size in (self.memory_available, self.memory_limit) if size is not None]
        return min(known, default=None)


def describe(measured: bool = False) -> Machine:
    """This machine. `measured` adds the rates of its arithmetic and its memory, which takes about 2 s."""
    model, flags = cpu_info()
    limits = cgroup_limits()
    total, available = _memory()
    torch_version, gpus = _torch()
    logical = os.cpu_count() or 1
    machine = Machine(
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch_version,
        cpu=model,
        physical_cores=physical_cores() or logical,
        logical_cores=logical,
        allowed_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        cpu_limit=limits.cpus,
        isa=tuple(name for name in ISA if name in flags),
        memory_total=total,
        memory_available=available,
        memory_limit=limits.memory,
        gpus=gpus,
        compiler=_compiler(),
    )
    if measured and torch_version is not None:
        spare = machine.usable_memory
        machine = replace(machine, rates=measure(buffer_bytes=256_000_000 if spare is None or spare > 4 * GB else 64_000_000))
    return machine


def slow_paths(machine: Machine) -> tuple[str, ...]:
    """What will be slow here and why, each with what helps; empty when nothing is."""
    has = set(machine.isa)
    found = []
    if machine.torch is None:
        found.append("torch is not installed: no model runs; run `pip install torch`")
    if machine.compiler is None:
        found.append("no C++ compiler: native kernels are off and torch's slower ones are used; run `apt install g++`")
    elif not native.enabled():
        found.append("ARMILLARY_NATIVE=0: native kernels are off and torch's slower ones are used; unset it")
    if not machine.gpus:
        found.append("no GPU: models run on the CPU; up to about a billion parameters answer at reading speed")
    if "asimd" not in has:  # x86
        if "avx2" not in has:
            found.append("no AVX2: arithmetic runs at a quarter of a modern core's speed or less; nothing but another CPU helps")
        elif "avx512f" not in has:
            found.append("no AVX-512: kernels use 8 lanes instead of 16")
        if not has & {"avx512_vnni", "avx_vnni", "amx_int8"}:
            found.append("no VNNI or AMX: 8-bit integer products are no faster than fp32; quantise weights to save memory, not arithmetic")
        if not has & {"avx512_bf16", "amx_bf16"}:
            found.append("no bf16 instructions: bfloat16 is emulated and slower than float32; keep float32")
    if machine.physical_cores < machine.logical_cores:
        found.append(
            f"{machine.logical_cores} logical cores share {machine.physical_cores} physical ones: more than {machine.physical_cores} threads "
            "rarely help"
        )
    if machine.usable_cores < machine.allowed_cores:
        found.append(
            f"this container may use {machine.usable_cores:g} of {machine.allowed_cores} cores: set as many threads, or raise its CPU limit"
        )
    spare = machine.usable_memory
    if spare is not None and spare < 2 * GB:
        found.append(f"only {format_bytes(spare)} of memory to spare: choose a small KV cache, or stop other programs")
    return tuple(found)


def physical_cores(root: Path = Path("/")) -> int | None:
    """Cores, not counting the threads that share one; None where the system does not say."""
    siblings = set()
    for path in (root / "sys/devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list"):
        try:
            siblings.add(path.read_text(encoding="ascii").strip())
        except OSError:
            return None
    return len(siblings) or None


def _memory(root: Path = Path("/")) -> tuple[int | None, int | None]:
    """Total and available bytes."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        try:
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
        except (ValueError, OSError, AttributeError):
            return None, None
    fields = {key: value.split() for key, _, value in (line.partition(":") for line in lines)}
    total, available = (int(fields[key][0]) * 1024 if key in fields else None for key in ("MemTotal", "MemAvailable"))
    return total, available


def _torch() -> tuple[str | None, tuple[GPU, ...]]:
    try:
        import torch
    except ImportError:
        return None, ()
    gpus = []
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            gpus.append(GPU(properties.name, properties.total_memory, f"{properties.major}.{properties.minor}"))
    return str(torch.__version__), tuple(gpus)


def _compiler() -> str | None:
    try:
        return native.compiler_version()
    except ArmillaryError:
        return None
