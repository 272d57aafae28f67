"""4-bit numbers in groups of 64, each with its smallest value and its step: FlexGen's compression of weights, keys and values.

A group's values lie on 16 levels from its smallest to its largest, so none moves by more than half a step. FlexGen keeps smallest value and
step in fp16, 4.5 bits a number; here they are fp32, 5 bits, so that values of up to 1e38 have room.

Sheng et al., "FlexGen" (ICML 2023), section 5 (asymmetric min-max quantisation, groups of 64).
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

GROUP: Final = 64
GROUP_BYTES: Final = GROUP // 2 + 2 * 4
BITS: Final = 8 * GROUP_BYTES / GROUP
"""Bits a number."""
_AT_ONCE: Final = 1 << 12  # groups that are worked on together: 1 MB, which a processor's cache holds


def compressed_bytes(count: int) -> int:
    """Bytes that `count` numbers take; the last group may have fewer than 64."""
    return -(-count // GROUP) * GROUP_BYTES


def scratch_bytes(rows: int, count: int) -> int:
    """What `compress` or `expand` of [rows, count] allocates at most: four results of the groups at hand, and rows padded to whole groups."""
    groups = rows * -(-count // GROUP)
    return 4 * GROUP * (4 * min(groups, _AT_ONCE) + (groups if count % GROUP else 0))


def compress(values: Tensor, out: Tensor) -> None:
    """`values` [rows, n] float32 into `out` [rows, compressed_bytes(n)] uint8: of each group 32 bytes of levels (the first half of the
    group's in the low nibbles), its step and its smallest value. What is not finite makes its group NaN."""
    rows, count = values.shape
    groups = -(-count // GROUP)
    if count % GROUP:  # padded with what is there already: neither the smallest nor the largest changes
        values = torch.cat([values, values[:, -1:].expand(rows, groups * GROUP - count)], 1)
    flat, packed = values.reshape(-1, GROUP), out.view(-1, GROUP_BYTES)
    for first in range(0, len(flat), _AT_ONCE):
        part, to = flat[first : first + _AT_ONCE], packed[first : first + _AT_ONCE]
        low, high = part.aminmax(dim=1, keepdim=True)
        step = (high - low) / 15
        levels = ((part - low) / step.clamp_min(torch.finfo(torch.float32).tiny)).round_().clamp_(0, 15)
        levels = levels.nan_to_num_(0.0).to(torch.uint8)
        to[:, : GROUP // 2] = levels[:, : GROUP // 2] | (levels[:, GROUP // 2 :] << 4)
        to[:, GROUP // 2 :] = torch.cat([step, low], 1).view(torch.uint8)


def expand(packed: Tensor, out: Tensor) -> None:
    """What `compress` wrote, [rows, bytes] uint8, into `out` [rows, n] float32: smallest value + level x step."""
    rows, count = out.shape
    if count % GROUP:
        whole = torch.empty(rows, -(-count // GROUP) * GROUP)
        expand(packed, whole)
        out.copy_(whole[:, :count])
        return
    flat, source = out.view(-1, GROUP), packed.view(-1, GROUP_BYTES)
    for first in range(0, len(flat), _AT_ONCE):
        part, to = source[first : first + _AT_ONCE], flat[first : first + _AT_ONCE]
        scales = part[:, GROUP // 2 :].contiguous().view(torch.float32)  # [groups, 2]
        levels = part[:, : GROUP // 2]
        to[:, : GROUP // 2] = levels & 15
        to[:, GROUP // 2 :] = levels >> 4
        to.mul_(scales[:, :1]).add_(scales[:, 1:])
