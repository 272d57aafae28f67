"""A gated feed-forward layer of chosen neurons (Liu et al., "Deja Vu", ICML 2023): work and memory traffic in proportion to how many there are."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor
from torch.nn import functional

from armillary.core import native
from armillary.core.errors import InputError
from armillary.kernels import cpu_library
from armillary.kernels.activations import ACTIVATIONS, Activation
from armillary.kernels.gated import activate


def active_rows(x: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation = "relu") -> Tensor:
    """sum over `rows` of activation(x . gate[row]) (x . up[row]) down[row].

    x: [tokens, d]; rows: [count] int32, no row twice; gate, up and `down`, which is the layer's matrix transposed: [neurons, d], float32 on the
    CPU. Returns [tokens, d]. The native loop where it can be had and d is a multiple of 16, else torch. Raises InputError for a row that is not there.
    """
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < len(gate):
        raise InputError(f"rows {int(rows.min())} to {int(rows.max())} of {len(gate)} neurons", f"name neurons 0 to {len(gate) - 1}")
    found = _library()
    d = x.shape[1]
    fits = all(tensor.is_contiguous() and tensor.dtype == torch.float32 and tensor.shape[-1] == d for tensor in (x, gate, up, down))
    if found is None or d % 16 or not fits or not len(x) == x.numel() // d > 0:
        return reference_active_rows(x, rows, gate, up, down, activation)
    rows, threads = rows.to(torch.int32).contiguous(), torch.get_num_threads()
    out, partial = torch.empty_like(x), x.new_empty(threads, *x.shape)
    pointers = (tensor.data_ptr() for tensor in (rows, x, gate, up, down, out, partial))
    found.arm_active_rows(len(x), d, len(rows), *pointers, ACTIVATIONS.index(activation), threads)
    return out


def reference_active_rows(x: Tensor, rows: Tensor, gate: Tensor, up: Tensor, down: Tensor, activation: Activation = "relu") -> Tensor:
    """The same by torch, which copies the rows together first."""
    chosen = rows.long()
    inner = activate(functional.linear(x, gate[chosen]), activation) * functional.linear(x, up[chosen])
    return inner @ down[chosen]


@functools.cache
def _library() -> ctypes.CDLL | None:
    found = native.load("active_rows", [cpu_library.FOLDER / "active_rows.cpp"], cpu_library.flags(), openmp=True)
    if found is not None:
        i, p = ctypes.c_int, ctypes.c_void_p
        found.arm_active_rows.argtypes = [i, i, ctypes.c_int64, *[p] * 7, i, i]
        found.arm_active_rows.restype = None
    return found
