"""Products with weights of 4 or 8 bits on a GPU: activations stay fp16 or bf16, weights are widened in the kernel.

Weights come in groups of 32 along the inputs, each with an fp16 scale d: `int8` and `int4` stand for d (level - 128) and
d (level - 8), `int4m` for d level + m with an fp16 minimum m (GGUF's Q8_0, Q4_0 and Q4_1 are such; the rounding is that of
`kernels.packed_weight`, bit for bit). Two neighbouring groups make a pair; a byte of 4-bit levels holds the same position of
both, low nibble first, so one load feeds two products without a shuffle. The levels of a pair lie [rows, 32 bytes] and the
scales of a group [rows], so what a program reads in a step is contiguous.

    up to 4 rows    `_gemv`: fp32 products and sums without matrix instructions, bound by reading the weights.
    more            `_gemm`: weights widened to the activations' dtype are the *left* operand of the matrix instruction (Hopper's takes
                    that one from registers, and its 64-row side is then never padding), so out^T = W x^T is what is computed.

Few outputs leave a card idle: the inputs are then split over programs, whose fp32 sums are added in a fixed order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from armillary.core.errors import InputError
from armillary.kernels.gpu.device import check_device, operand, processors

Format = Literal["int8", "int4", "int4m"]
GROUP = 32
GEMV_ROWS = 4  # largest batch of the product without matrix instructions
MAX_SPLITS = 64
_CENTRE: dict[Format, int] = {"int8": 128, "int4": 8, "int4m": 0}


@dataclass(frozen=True, slots=True)
class QuantisedWeight:
    """A weight [n, k] in the kernels' layout; `k` is padded to pairs of groups whose scales are zero.

    levels: int8 (level - 128) [groups, n, 32], or uint8 (two groups a byte) [groups / 2, n, 32]; scales, minimums: fp16 [groups, n].
    """

    format: Format
    shape: tuple[int, int]
    levels: Tensor
    scales: Tensor
    minimums: Tensor | None

    @property
    def nbytes(self) -> int:
        return self.levels.nbytes + self.scales.nbytes + (0 if self.minimums is None else self.minimums.nbytes)

    def to(self, device: torch.device | str) -> QuantisedWeight:
        minimums = None if self.minimums is None else self.minimums.to(device)
        return replace(self, levels=self.levels.to(device), scales=self.scales.to(device), minimums=minimums)

    def dequantise(self) -> Tensor:
        """What the weight stands for: fp32 [n, k]."""
        n, k = self.shape
        levels = self.levels
        if self.format != "int8":
            levels = torch.stack((levels & 15, levels >> 4), 1).flatten(0, 1)  # [groups, n, 32]
        centre = 0 if self.format == "int8" else _CENTRE[self.format]
        weight = (levels.float() - centre) * self.scales.float()[:, :, None]
        if self.minimums is not None:
            weight += self.minimums.float()[:, :, None]
        return weight.permute(1, 0, 2).reshape(n, -1)[:, :k].contiguous()


def quantise(weight: Tensor, format: Format) -> QuantisedWeight:
    """Round a weight [n, k] to the nearest levels. Raises InputError for one that is not finite or outgrows fp16 scales."""
    _check_weight(weight, format)
    n, k = weight.shape
    groups = functional.pad(weight.detach().float(), (0, -k % GROUP)).view(n, -1, GROUP)
    low, high = groups.amin(2), groups.amax(2)
    minimums = None
    if format == "int4m":
        scales, minimums = ((high - low) / 15).half(), low.half()
        offset = -minimums.float()
    else:
        # The largest magnitude decides, with its sign in 4 bits: it becomes -8, as in GGUF's Q4_0.
        extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
        scales = (extreme / -8).half() if format == "int4" else (extreme.abs() / 127).half()
        offset = _CENTRE[format] * scales.float()
    if not bool(torch.isfinite(scales).all()) or (minimums is not None and not bool(torch.isfinite(minimums).all())):
        raise InputError("a weight is too large for the fp16 scale of its group", "check the model file, or serve it unquantised")
    d = scales.float()[:, :, None]
    levels = ((groups + offset[:, :, None]) / d + 0.5).floor().clamp(0, 255 if format == "int8" else 15)
    levels = torch.where(d == 0, _CENTRE[format], levels).to(torch.uint8)
    return pack(levels.view(n, -1)[:, :k], scales, minimums, format)


def pack(levels: Tensor, scales: Tensor, minimums: Tensor | None, format: Format) -> QuantisedWeight:
    """Lay out levels uint8 [n, k] (0 to 15, or to 255) with fp16 scales and minimums [n, ceil(k / 32)], as a GGUF file has them."""
    _check_weight(levels, format)
    n, k = levels.shape
    groups = -(-k // GROUP)
    for name, values, wanted in (("scales", scales, True), ("minimums", minimums, format == "int4m")):
        if (values is not None) != wanted or (values is not None and tuple(values.shape) != (n, groups)):
            found = "none" if values is None else str(list(values.shape))
            raise InputError(f"{name}: {found} for {format} levels {[n, k]}", f"give {[n, groups] if wanted else 'none'}")
    if format != "int8" and int(levels.max()) > 15:
        raise InputError(f"a level is {int(levels.max())}", "4 bits hold 0 to 15")
    padding = -groups % 2
    padded = functional.pad(levels, (0, (groups + padding) * GROUP - k)).view(n, -1, GROUP).transpose(0, 1)  # [groups, n, 32]
    laid = (padded.to(torch.int16) - 128).to(torch.int8) if format == "int8" else padded[0::2] | (padded[1::2] << 4)

    def by_group(values: Tensor) -> Tensor:
        return functional.pad(values.half(), (0, padding)).T.contiguous()

    return QuantisedWeight(format, (n, k), laid.contiguous(), by_group(scales), None if minimums is None else by_group(minimums))


def reference_quantised_linear(x: Tensor, weight: QuantisedWeight) -> Tensor:
    """What `quantised_linear` computes, in float64: x [m, k] -> [m, n]."""
    return x.double() @ weight.dequantise().double().T


@dataclass(frozen=True, slots=True)
class Tiles:
    """The kernels' schedule. `rows` of x (1 to 4: the GEMV) by `columns` of the result; `pairs` of groups a step; `splits` of k."""

    rows: int
    columns: int
    pairs: int
    splits: int
    warps: int
    stages: int


def choose_tiles(m: int, n: int, k: int, cores: int) -> Tiles:
    """A schedule for x [m, k] and a weight [n, k] on a card of `cores` multiprocessors. Chosen by arithmetic, not yet by measurement."""
    pairs = -(-k // (2 * GROUP))
    if m <= GEMV_ROWS:
        programs, step = -(-n // 16), 4
        splits = min(-(-4 * cores // programs), pairs // (2 * step), MAX_SPLITS)
        return Tiles(triton.next_power_of_2(m), 16, step, max(1, splits), 4, 2)
    rows = min(128, max(16, triton.next_power_of_2(m)))
    columns = 64 if rows <= 32 else 128
    programs = -(-n // columns) * -(-m // rows)
    splits = min(-(-2 * cores // programs), pairs // 8, MAX_SPLITS) if rows <= 64 else 1
    return Tiles(rows, columns, 1, max(1, splits), 4 if rows <= 64 else 8, 3)


def quantised_linear(x: Tensor, weight: QuantisedWeight, tiles: Tiles | None = None) -> Tensor:
    """x [..., k] in fp16 or bf16 times the weight's transpose -> [..., n] in the dtype of x, with fp32 sums.

    `tiles` None: by `choose_tiles`, which looks at the batch, so the last bits of a row follow from the batch's size.
    Raises InputError when shapes, dtypes or devices do not fit.
    """
    n, k = weight.shape
    check_device(x.device, _gemm)
    if x.dim() < 1 or x.shape[-1] != k:
        raise InputError(f"x is {list(x.shape)}, the weight {[n, k]}", f"give x with {k} columns")
    if x.dtype not in (torch.float16, torch.bfloat16):
        raise InputError(f"x is {x.dtype}", "activations are float16 or bfloat16 here")
    if x.device != weight.levels.device:
        raise InputError(f"x is on {x.device} and the weight on {weight.levels.device}", "put them on one device")
    flat = x.reshape(-1, k)
    flat = flat if flat.stride(1) == 1 else flat.contiguous()
    m = flat.shape[0]
    if m == 0:
        return x.new_empty((*x.shape[:-1], n))
    tiles = tiles or choose_tiles(m, n, k, processors(x.device))
    if tiles.rows < 16 and m > tiles.rows:
        raise InputError(f"tiles of {tiles.rows} rows for {m} rows of x", "the product without matrix instructions takes one tile of rows")
    out = torch.empty(
        (m, n) if tiles.splits == 1 else (tiles.splits, m, n), dtype=x.dtype if tiles.splits == 1 else torch.float32, device=x.device
    )
    arguments = (
        flat,
        weight.levels,
        weight.scales,
        weight.scales if weight.minimums is None else weight.minimums,
        out,
        m,
        n,
        k,
        flat.stride(0),
    )
    common = {"FORMAT": weight.format, "ROWS": tiles.rows, "COLUMNS": tiles.columns, "num_warps": tiles.warps, "num_stages": tiles.stages}
    with torch.cuda.device_of(x):
        if tiles.rows < 16:
            _gemv[(triton.cdiv(n, tiles.columns), tiles.splits)](*arguments, PAIRS=tiles.pairs, **common)
        else:
            # Programs that read the same weights follow each other, so the second finds them in the card's cache.
            _gemm[(triton.cdiv(m, tiles.rows), triton.cdiv(n, tiles.columns), tiles.splits)](
                *arguments, OPERAND=operand(x.dtype, _gemm), **common
            )
    return (out if tiles.splits == 1 else out.sum(0).to(x.dtype)).view(*x.shape[:-1], n)


@triton.jit
def _widen(levels_ptr, scales_ptr, minimums_ptr, pair, column, lane, mask, n, FORMAT: tl.constexpr):
    """The two groups of a pair as fp32. `pair`, `column` and `lane` are indices that broadcast to the tile's shape; `lane`
    spans the 32 positions, `mask` and the scales stop short of it."""
    first = (2 * pair * n + column).to(tl.int64)
    second = first + n
    if FORMAT == "int8":
        low = tl.load(levels_ptr + first * 32 + lane, mask=mask, other=0).to(tl.float32)
        high = tl.load(levels_ptr + second * 32 + lane, mask=mask, other=0).to(tl.float32)
    else:
        packed = tl.load(levels_ptr + (pair * n + column).to(tl.int64) * 32 + lane, mask=mask, other=0)
        low = (packed & 15).to(tl.float32)
        high = (packed >> 4).to(tl.float32)
        if FORMAT == "int4":
            low -= 8.0
            high -= 8.0
    low *= tl.load(scales_ptr + first, mask=mask, other=0.0).to(tl.float32)
    high *= tl.load(scales_ptr + second, mask=mask, other=0.0).to(tl.float32)
    if FORMAT == "int4m":
        low += tl.load(minimums_ptr + first, mask=mask, other=0.0).to(tl.float32)
        high += tl.load(minimums_ptr + second, mask=mask, other=0.0).to(tl.float32)
    return low, high


@triton.jit
def _gemv(
    x_ptr,
    levels_ptr,
    scales_ptr,
    minimums_ptr,
    out_ptr,
    m,
    n,
    k,
    x_row,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """x [m, k] with m <= ROWS times COLUMNS rows of the weight: programs (columns, split). out: [splits, m, n]."""
    row = tl.arange(0, ROWS)[:, None, None, None]
    step = tl.arange(0, PAIRS)[:, None, None]
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[None, :, None]
    lane = tl.arange(0, 32)[None, None, :]
    pairs = tl.cdiv(k, 64)
    share = tl.cdiv(tl.cdiv(pairs, PAIRS), tl.num_programs(1)) * PAIRS
    begin = tl.program_id(1) * share
    end = tl.minimum(pairs, begin + share)
    sums = tl.zeros([ROWS, PAIRS, COLUMNS, 32], tl.float32)
    for first in range(begin, end, PAIRS):
        pair = first + step
        low, high = _widen(levels_ptr, scales_ptr, minimums_ptr, pair, column, lane, (pair < end) & (column < n), n, FORMAT)
        input = pair * 64 + lane  # [PAIRS, 1, 32]
        at = x_ptr + row.to(tl.int64) * x_row + input[None]
        there = (row < m) & (pair < end)[None]
        x_low = tl.load(at, mask=there & (input < k)[None], other=0.0).to(tl.float32)
        x_high = tl.load(at + 32, mask=there & (input + 32 < k)[None], other=0.0).to(tl.float32)
        sums += low[None] * x_low + high[None] * x_high
    result = tl.sum(tl.sum(sums, 3), 1)  # [ROWS, COLUMNS]
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    to = out_ptr + (tl.program_id(1) * m + rows).to(tl.int64) * n + columns
    tl.store(to, result.to(out_ptr.dtype.element_ty), mask=(rows < m) & (columns < n))


@triton.jit
def _gemm(
    x_ptr,
    levels_ptr,
    scales_ptr,
    minimums_ptr,
    out_ptr,
    m,
    n,
    k,
    x_row,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """A tile [COLUMNS, ROWS] of the result's transpose: programs (rows, columns, split). out: [splits, m, n]."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, 32)
    pairs = tl.cdiv(k, 64)
    share = tl.cdiv(pairs, tl.num_programs(2))
    begin = tl.program_id(2) * share
    end = tl.minimum(pairs, begin + share)
    x_at = x_ptr + row[None, :].to(tl.int64) * x_row + lane[:, None]
    sums = tl.zeros([COLUMNS, ROWS], tl.float32)
    for pair in range(begin, end):
        low, high = _widen(levels_ptr, scales_ptr, minimums_ptr, pair, column[:, None], lane[None, :], (column < n)[:, None], n, FORMAT)
        input = pair * 64 + lane[:, None]
        x_low = tl.load(x_at + pair * 64, mask=(row < m)[None, :] & (input < k), other=0.0)  # [32, ROWS]
        x_high = tl.load(x_at + pair * 64 + 32, mask=(row < m)[None, :] & (input + 32 < k), other=0.0)
        sums = tl.dot(low.to(x_low.dtype).to(OPERAND), x_low.to(OPERAND), sums)
        sums = tl.dot(high.to(x_high.dtype).to(OPERAND), x_high.to(OPERAND), sums)
    to = out_ptr + (tl.program_id(2) * m + row[None, :]).to(tl.int64) * n + column[:, None]
    tl.store(to, sums.to(out_ptr.dtype.element_ty), mask=(row < m)[None, :] & (column < n)[:, None])


def _check_weight(weight: Tensor, format: str) -> None:
    if format not in _CENTRE:
        raise InputError(f"no weight format is called {format!r}", f"one of {', '.join(_CENTRE)}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise InputError(f"a weight is {list(weight.shape)}", "give [outputs, inputs], both at least 1")
    if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
        raise InputError(f"a weight {list(weight.shape)} has NaN or infinite values", "check the model file")
