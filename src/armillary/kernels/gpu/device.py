"""Where a Triton kernel can run: on a GPU, or on a CPU in Triton's interpreter (slow: a check of numbers, not a way to serve)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from armillary.core.errors import InputError


def check_device(device: torch.device, kernel: object) -> None:
    """Raises InputError for a device that `kernel` does not run on. Triton decides when it is imported whether it interprets."""
    if device.type != "cuda" and not (_interpreted(kernel) and device.type == "cpu"):
        raise InputError(
            f"the GPU kernels were given tensors on {device}",
            "move them to a GPU, or set TRITON_INTERPRET=1 before Triton is imported to check numbers on a CPU",
        )


def processors(device: torch.device) -> int:
    """Multiprocessors (compute units) of the card; 1 for the interpreter, which runs program after program."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def operand(dtype: torch.dtype, kernel: object) -> tl.dtype:
    """What the matrix products of `kernel` read when its tensors are `dtype`: the same, but for bfloat16 in the interpreter,
    which multiplies its bits as integers (Triton 3.9): float32, where each product is exact as in the hardware."""
    if dtype == torch.bfloat16 and _interpreted(kernel):
        return tl.float32
    return {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[dtype]


def _interpreted(kernel: object) -> bool:
    return not isinstance(kernel, triton.JITFunction)
