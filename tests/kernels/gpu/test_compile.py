"""What the GPU kernels' wrappers would launch compiles for cards that are not here and fits into them.

In a process of its own: Triton decides at its import whether it compiles or interprets.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[2] / "src"
# Shared memory that a program may have, from the CUDA programming guide's table of compute capabilities and the CDNA3 manual.
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
REGISTERS = 64 << 10  # of 32 bits a multiprocessor
CASES = {
    "sm_90": (),  # all
    "sm_80": ("attention-bf16-128", "attention-fp32-256", "linear-fp16-int4m-1", "linear-bf16-int4-16", "linear-bf16-int4-256"),
    "gfx942": ("attention-bf16-256-window-softcap", "attention-fp16-80-shared-by-71", "linear-fp16-int4m-1", "linear-fp16-int8-256"),
}


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(SOURCE), "TRITON_DEFAULT_FP_FUSION": "1"} | variables
    return subprocess.run([sys.executable, *arguments], cwd=HERE, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed: pip install 'armillary[gpu]'")
@pytest.mark.parametrize("target", SHARED)
def test_kernels_compile_and_fit(target: str, tmp_path: Path) -> None:
    done = run("compile_kernels.py", target, *CASES[target], TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    kernels: list[dict[str, Any]] = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"_attend", "_merge", "_gemv", "_gemm"}
    for kernel in kernels:
        assert kernel["shared"] <= SHARED[target], kernel
        if target.startswith("sm_"):
            assert kernel["reg"] * kernel["warps"] * 32 <= REGISTERS, kernel
            assert kernel["stack"] <= 32, f"registers were spilled: {kernel}"
        # fp32 is multiplied without matrix instructions on purpose: NVIDIA's would round it to ten bits.
        if kernel["kernel"] == "_gemm" or (kernel["kernel"] == "_attend" and "fp32" not in kernel["case"]):
            assert kernel["matrix"], kernel


def test_tensors_on_a_cpu_are_refused_by_what_is_compiled() -> None:
    pytest.importorskip("triton")
    code = """
import torch
from armillary.kernels.gpu.quantised_linear import quantise, quantised_linear
quantised_linear(torch.ones(1, 32).half(), quantise(torch.ones(4, 32), "int4"))
"""
    assert "tensors on cpu: move them to a GPU, or set TRITON_INTERPRET=1" in run("-c", code).stderr


def test_without_triton_the_error_names_what_installs_it() -> None:
    answer = run("-c", "import sys; sys.modules['triton'] = None; import armillary.kernels.gpu.paged_attention")
    assert "MissingDependencyError" in answer.stderr
    assert "pip install 'armillary[gpu]'" in answer.stderr
