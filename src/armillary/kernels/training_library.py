"""The compiled loops of a training step on a CPU (`cpu/train_*.cpp`), registered as torch operators of the namespace `armillary`.

They take ordinary float32 tensors; everything else (DTensor, half precision, a GPU, no compiler) goes torch's own way, which each caller keeps.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from armillary.core import native
from armillary.core.errors import InputError
from armillary.kernels import cpu_library

SOURCES = ("train_attention.cpp", "train_loss.cpp", "train_pointwise.cpp")
_int, _long, _float, _pointer = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_SIGNATURES: dict[str, list[Any]] = {
    "attention": [_int] * 4 + [_float, _int] + [_pointer] * 6 + [_int],
    "attention_backward": [_int] * 4 + [_float, _int] + [_pointer] * 10 + [_int],
    "cross_entropy": [_int] * 4 + [_pointer] * 7 + [_int],
    "norm": [_long, _int, _float, *[_pointer] * 4, _int],
    "norm_backward": [_long, _int, *[_pointer] * 7, _int],
    "rope": [_long, _int, _int, *[_pointer] * 4, _int, _int],
    "swiglu": [_long, *[_pointer] * 3, _int],
    "swiglu_backward": [_long, *[_pointer] * 5, _int],
    "transpose": [_long, _long, *[_pointer] * 2, _int],
}
_FALLIBLE = ("attention", "attention_backward", "cross_entropy")  # they return 1 when there is no memory
_ORDINARY = (Tensor, nn.Parameter, FakeTensor)

_operators = torch.library.Library("armillary", "FRAGMENT")  # type: ignore[no-untyped-call]


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled loops; None without a compiler (said once), or where the processor's vectors are no wider than torch's own loops use."""
    sources = [cpu_library.FOLDER / name for name in SOURCES]
    found = native.load("training", sources, cpu_library.flags(), openmp=True)
    if found is None or not found.arm_train_vectors():
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(found, f"arm_train_{name}")
        function.argtypes = arguments
        function.restype = ctypes.c_int if name in _FALLIBLE else None
    return found


def plain(*tensors: Tensor | None) -> bool:
    """Whether all are ordinary tensors (or fakes of them) in float32 on the CPU, outside of torch.func's transforms, autocast and torch.compile.

    None is left out.
    """
    return (
        all(type(t) in _ORDINARY and t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors if t is not None)
        and torch._C._functorch.maybe_current_level() is None
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
    )


def takes(*tensors: Tensor | None) -> bool:
    """Whether a step that needs gradients of these should use the compiled loops."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors) and plain(*tensors) and library() is not None


def require(condition: bool, what: str, *tensors: Tensor) -> None:
    """Raises InputError unless the shapes fit: the loops read as far as they are told."""
    if not condition:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
        raise InputError(f"{what}, but the shapes are {shapes}", "give tensors that belong together")


def call(name: str, *arguments: Any) -> None:
    """Run a loop on all of torch's threads; tensors must be contiguous. Raises MemoryError."""
    found = library()
    assert found is not None, "asked for before `library()`"
    tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in tensors), f"{name} reads contiguous float32 tensors"
    values = [argument.data_ptr() if isinstance(argument, Tensor) else argument for argument in arguments]
    if getattr(found, f"arm_train_{name}")(*values, torch.get_num_threads()):
        raise MemoryError(f"no memory for the scratch space of {name}")


def operator(schema: str, shapes: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Registers a function as `torch.ops.armillary.NAME` for the CPU; `shapes`, with the same arguments, makes empty results (the fake)."""
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _operators.define(schema)  # type: ignore[no-untyped-call]
        _operators.impl(name, function, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"armillary::{name}", shapes, lib=_operators)
        registered: Callable[..., Any] = getattr(torch.ops.armillary, name).default
        return registered

    return register
