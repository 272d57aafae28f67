"""Only some tokens may come: masks of a bit a token, as grammars give them, on rows of logits.

Bit t % 32 of word t // 32 is token t. In torch (`barred`) and in C++ (`cpu/sample.cpp`), where a row is read once.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from armillary.kernels.cpu_library import library

_BARRED = torch.where((torch.arange(256)[:, None] >> torch.arange(8)) & 1 == 1, 0.0, -math.inf)  # [byte of a mask, token]


def allows(allowed: Tensor, token: int) -> bool:
    """Whether `allowed` (int32 [ceil(vocabulary / 32)]) lets a token through."""
    return 0 <= token < 32 * allowed.shape[0] and bool(int(allowed[token // 32]) >> (token % 32) & 1)


def barred(row: Tensor, allowed: Tensor) -> Tensor:
    """`row` [vocabulary] with -inf for all tokens that `allowed` does not let through, on the row's device."""
    _fits(row, allowed)
    # A row of 8 numbers for each byte of the mask, looked up as embeddings are: 20 times faster than testing bits one by one.
    bars = torch.nn.functional.embedding(allowed.view(torch.uint8).int().to(row.device), _BARRED.to(row.device))
    return row + bars.view(-1)[: row.shape[0]]


def best_allowed(row: Tensor, allowed: Tensor) -> tuple[int, float]:
    """The first allowed token with the largest logit of `row` [vocabulary], and that logit: -1 and -inf where none has a chance.

    Rows with NaN or +inf are the caller's to refuse.
    """
    lib = _native(row, allowed)
    if lib is None:
        values = barred(row, allowed)
        token = int(values.argmax())
        peak = float(values[token])
        return (token, peak) if peak > -math.inf else (-1, -math.inf)
    peak_of = ctypes.c_float()
    token = int(lib.arm_allowed(row.data_ptr(), row.shape[0], allowed.data_ptr(), None, ctypes.byref(peak_of)))
    return token, peak_of.value


def only_allowed(row: Tensor, allowed: Tensor) -> tuple[Tensor, float]:
    """`barred`, and the largest logit that is left."""
    lib = _native(row, allowed)
    if lib is None:
        values = barred(row, allowed)
        return values, float(values.max())
    values, peak = torch.empty_like(row), ctypes.c_float()
    lib.arm_allowed(row.data_ptr(), row.shape[0], allowed.data_ptr(), values.data_ptr(), ctypes.byref(peak))
    return values, peak.value


def _fits(row: Tensor, allowed: Tensor) -> None:
    if 32 * allowed.shape[0] < row.shape[0]:
        raise ValueError(f"a mask of {allowed.shape[0]} words for {row.shape[0]} tokens")


def _native(row: Tensor, allowed: Tensor) -> ctypes.CDLL | None:
    _fits(row, allowed)
    plain = row.device.type == "cpu" and row.dtype == torch.float32 and row.is_contiguous()
    return library() if plain and allowed.is_contiguous() and allowed.dtype == torch.int32 else None
