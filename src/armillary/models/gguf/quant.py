"""Block quantisation: GGUF's stored bytes to float32 and back, bit for bit as ggml's reference does it.

Every decoder takes blocks [n, block bytes] uint8 and writes float32 [n, block elements]; nothing is fused or reordered, so the results
equal the reference exactly. Blocks are worked through in pieces that stay in the L2 cache, on a few threads (numpy releases the GIL).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np

from armillary.core.errors import InputError
from armillary.models.gguf.reader import GGUFTensor
from armillary.models.gguf.types import BY_NAME, TensorType

_PIECE = 131_072  # elements: 512 KiB of float32
_LOW = np.uint8(0x0F)

Decode = Callable[[np.ndarray, np.ndarray], None]


def _half(blocks: np.ndarray, at: int) -> np.ndarray:
    """The float16 at byte `at` of every block, as float32 [n, 1]."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view(np.float16).astype(np.float32)


def _nibbles(packed: np.ndarray, out: np.ndarray) -> None:
    """[n, groups, width] bytes to [n, groups, 2, width]: low nibbles first, then high ones."""
    np.bitwise_and(packed, _LOW, out=out[:, :, 0])
    np.right_shift(packed, 4, out=out[:, :, 1])


def _f32(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = np.ascontiguousarray(blocks).view("<f4")


def _f16(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = np.ascontiguousarray(blocks).view("<f2")


def _bf16(blocks: np.ndarray, out: np.ndarray) -> None:
    np.left_shift(np.ascontiguousarray(blocks).view("<u2"), 16, out=out.view(np.uint32), dtype=np.uint32)


def _q4_0(blocks: np.ndarray, out: np.ndarray) -> None:
    q = np.empty((len(blocks), 1, 2, 16), np.uint8)
    _nibbles(blocks[:, None, 2:], q)
    out[:] = q.reshape(len(blocks), 32).view(np.int8) - np.int8(8)
    out *= _half(blocks, 0)


def _q4_1(blocks: np.ndarray, out: np.ndarray) -> None:
    q = np.empty((len(blocks), 1, 2, 16), np.uint8)
    _nibbles(blocks[:, None, 4:], q)
    out[:] = q.reshape(len(blocks), 32)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _five_bits(blocks: np.ndarray, at: int) -> np.ndarray:
    """[n, 32] values of 0..31: 32 high bits at byte `at`, then 16 bytes of low nibbles."""
    q = np.empty((len(blocks), 1, 2, 16), np.uint8)
    _nibbles(blocks[:, None, at + 4 :], q)
    high = np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little")
    return q.reshape(len(blocks), 32) | (high << 4)


def _q5_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 2).view(np.int8) - np.int8(16)
    out *= _half(blocks, 0)


def _q5_1(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = _five_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: np.ndarray, out: np.ndarray) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _q8_k(blocks: np.ndarray, out: np.ndarray) -> None:
    # float32 scale, 256 int8, then 16 sums that only dot products use.
    out[:] = blocks[:, 4:260].view(np.int8)
    out *= np.ascontiguousarray(blocks[:, :4]).view("<f4")


def _q2_k(blocks: np.ndarray, out: np.ndarray) -> None:
    n = len(blocks)
    scales, packed = blocks[:, :16], blocks[:, 16:80].reshape(n, 2, 1, 32)
    scale = (_half(blocks, 80) * (scales & _LOW).astype(np.float32)).reshape(n, 16, 1)
    minimum = (_half(blocks, 82) * (scales >> 4).astype(np.float32)).reshape(n, 16, 1)
    q = (packed >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & np.uint8(3)
    groups = out.reshape(n, 16, 16)
    groups[:] = q.reshape(n, 16, 16)
    groups *= scale
    groups -= minimum


def _q3_k(blocks: np.ndarray, out: np.ndarray) -> None:
    n = len(blocks)
    packed_scales = blocks[:, 96:108]
    low = (packed_scales[:, None, :8] >> np.array([0, 4], np.uint8).reshape(1, 2, 1)).reshape(n, 16) & _LOW
    high = (packed_scales[:, None, 8:] >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 4, 1)).reshape(n, 16) & np.uint8(3)
    scales = ((low | (high << 4)).view(np.int8) - np.int8(32)).astype(np.float32)
    q = (blocks[:, 32:96].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & np.uint8(3)
    mask = (blocks[:, :32].reshape(n, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    # A set mask bit means "do not subtract 4".
    values = q.reshape(n, 256).view(np.int8) - ((mask.reshape(n, 256) ^ np.uint8(1)) << 2).view(np.int8)
    groups = out.reshape(n, 16, 16)
    groups[:] = values.reshape(n, 16, 16)
    groups *= (_half(blocks, 108) * scales).reshape(n, 16, 1)


def _scales_and_minima(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Q4_K and Q5_K: eight 6-bit scales and eight 6-bit minima in 12 bytes, times their float16 factors: [n, 8, 1] each."""
    n = len(blocks)
    d, m, both = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scale = np.concatenate([d & 0x3F, (both & _LOW) | ((d >> 2) & 0x30)], axis=1).astype(np.float32)
    minimum = np.concatenate([m & 0x3F, (both >> 4) | ((m >> 2) & 0x30)], axis=1).astype(np.float32)
    return (_half(blocks, 0) * scale).reshape(n, 8, 1), (_half(blocks, 2) * minimum).reshape(n, 8, 1)


def _q4_k(blocks: np.ndarray, out: np.ndarray) -> None:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    q = np.empty((n, 4, 2, 32), np.uint8)
    _nibbles(blocks[:, 16:].reshape(n, 4, 32), q)
    groups = out.reshape(n, 8, 32)
    groups[:] = q.reshape(n, 8, 32)
    groups *= scale
    groups -= minimum


def _q5_k(blocks: np.ndarray, out: np.ndarray) -> None:
    n = len(blocks)
    scale, minimum = _scales_and_minima(blocks)
    q = np.empty((n, 4, 2, 32), np.uint8)
    _nibbles(blocks[:, 48:].reshape(n, 4, 32), q)
    high = (blocks[:, 16:48].reshape(n, 1, 32) >> np.arange(8, dtype=np.uint8).reshape(1, 8, 1)) & np.uint8(1)
    groups = out.reshape(n, 8, 32)
    groups[:] = q.reshape(n, 8, 32) | (high << 4)
    groups *= scale
    groups -= minimum


def _q6_k(blocks: np.ndarray, out: np.ndarray) -> None:
    n = len(blocks)
    low = np.empty((n, 2, 2, 64), np.uint8)
    _nibbles(blocks[:, :128].reshape(n, 2, 64), low)
    high = (blocks[:, 128:192].reshape(n, 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & np.uint8(3)
    values = (low.reshape(n, 256) | (high.reshape(n, 256) << 4)).view(np.int8) - np.int8(32)
    groups = out.reshape(n, 16, 16)
    groups[:] = values.reshape(n, 16, 16)
    groups *= (_half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32)).reshape(n, 16, 1)


_DECODE: dict[str, Decode] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "Q8_K": _q8_k,
}
READABLE = tuple(_DECODE)


def dequantise_blocks(data: np.ndarray, kind: TensorType, out: np.ndarray | None = None, pool: Executor | None = None) -> np.ndarray:
    """Stored bytes [rows, row_bytes] uint8 to float32 [rows, elements], into `out` when given (C-contiguous), on `pool`'s threads.

    Raises `InputError` for a type that has no decoder here.
    """
    decode = _DECODE.get(kind.name)
    if decode is None:
        raise InputError(f"tensors of type {kind.name} cannot be dequantised", f"convert the model to one of {', '.join(READABLE)}")
    rows, row_bytes = data.shape
    elements = row_bytes // kind.size * kind.block
    if out is None:
        out = np.empty((rows, elements), np.float32)
    width = elements if kind.block == 1 else kind.block
    blocks = np.ascontiguousarray(data).reshape(-1, width // kind.block * kind.size)
    values = out.reshape(-1, width)
    piece = max(1, _PIECE // width)
    starts = range(0, len(blocks), piece)

    def work(start: int) -> None:
        with np.errstate(invalid="ignore", over="ignore"):  # non-finite scales are data here, not a fault of the arithmetic
            decode(blocks[start : start + piece], values[start : start + piece])

    for _ in (map if pool is None or len(starts) < 4 else pool.map)(work, starts):
        pass
    return out


def dequantise(tensor: GGUFTensor) -> np.ndarray:
    """A stored tensor as float32 of its shape."""
    return dequantise_blocks(tensor.data, tensor.type).reshape(tensor.shape)


# -- quantising (writing) -------------------------------------------------------------------------------------


def _inverse(scale: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.where(scale == 0, np.float32(0), np.float32(1) / scale)


def _to_q8_0(blocks: np.ndarray) -> np.ndarray:
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    scaled = blocks * _inverse(scale)
    size = np.abs(scaled)
    floor = np.floor(size)
    q = np.sign(scaled) * (floor + np.floor(2 * (size - floor)))  # half away from zero, as C's roundf
    return np.concatenate([scale.astype(np.float16).view(np.uint8), q.astype(np.int8).view(np.uint8)], axis=1)


def _to_q4_0(blocks: np.ndarray) -> np.ndarray:
    at = np.abs(blocks).argmax(axis=1, keepdims=True)
    scale = np.take_along_axis(blocks, at, axis=1) / np.float32(-8)  # the largest magnitude keeps its sign and becomes -8
    q = np.trunc(blocks * _inverse(scale) + np.float32(8.5)).astype(np.uint8).clip(0, 15)
    return np.concatenate([scale.astype(np.float16).view(np.uint8), q[:, :16] | (q[:, 16:] << 4)], axis=1)


WRITABLE = ("F32", "F16", "Q8_0", "Q4_0")


def quantise(values: np.ndarray, name: str) -> np.ndarray:
    """float32 [rows, elements] to stored bytes [rows, row_bytes]; `name` is one of `WRITABLE`.

    Raises `InputError` for another type, for rows that are not a multiple of the block, and for values that are not finite.
    """
    if name not in WRITABLE:
        raise InputError(f"tensors cannot be written as {name}", f"choose one of {', '.join(WRITABLE)}")
    kind = BY_NAME[name]
    values = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(values).all():
        raise InputError("the tensor holds values that are not finite", "repair the weights before writing them")
    if name == "F32":
        return values.view(np.uint8)
    if name == "F16":
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.isfinite(half).all():
            raise InputError("the tensor holds values beyond float16's 65,504", "write it as F32")
        return half.view(np.uint8)
    rows, elements = values.shape
    if elements % kind.block:
        raise InputError(f"rows of {elements} elements cannot be written as {name}", f"it stores {kind.block} elements at a time; use F16")
    encode = _to_q8_0 if name == "Q8_0" else _to_q4_0
    blocks = values.reshape(-1, kind.block)
    stored = np.empty((len(blocks), kind.size), np.uint8)
    piece = _PIECE // kind.block
    for start in range(0, len(blocks), piece):
        stored[start : start + piece] = encode(blocks[start : start + piece])
    return stored.reshape(rows, kind.row_bytes(elements))
