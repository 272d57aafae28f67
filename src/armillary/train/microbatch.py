"""What one forward and backward pass reads: flat, padding-free tokens of whole documents laid end to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from armillary.core.errors import InputError
from armillary.kernels.attention import CausalAttend

IGNORED = -100  # a target that is not scored, as in torch's cross_entropy


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """tokens, targets, positions: [T] int64; `lengths`, in tokens, of the documents laid end to end (they add up to T).

    `targets[i]` is the token after `tokens[i]`, IGNORED where nothing is scored. `positions` restart at 0 in each document.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        size = self.tokens.shape
        if len(size) != 1 or self.targets.shape != size or self.positions.shape != size or sum(self.lengths) != size[0]:
            raise InputError(
                f"a micro-batch of tokens {list(size)}, targets {list(self.targets.shape)}, positions {list(self.positions.shape)} "
                f"and lengths that add up to {sum(self.lengths)}",
                "give three flat tensors of the same length, and the length of every document in them",
            )

    @property
    def scored(self) -> int:
        """How many targets count."""
        return int((self.targets != IGNORED).sum())

    @property
    def attend(self) -> CausalAttend:
        """The document mask."""
        return CausalAttend(self.lengths)


def from_rows(tokens: Any, targets: Any, positions: Any) -> MicroBatch:
    """Rows [R, T] of tensors or arrays as one flat micro-batch; a document begins wherever its position is 0, and with every row.

    Documents without a scored target (padding at the ends of rows) are left out: nothing else sees them. One stays if there is no other.
    """
    tokens, targets, positions = (torch.as_tensor(rows).to(torch.int64) for rows in (tokens, targets, positions))
    starts = positions == 0
    starts[..., 0] = True
    tokens, targets, positions, starts = (rows.flatten() for rows in (tokens, targets, positions, starts))
    owner = starts.cumsum(0) - 1
    lengths = torch.bincount(owner)
    wanted = torch.bincount(owner, weights=(targets != IGNORED).double()) > 0
    wanted[0] |= not bool(wanted.any())
    if not bool(wanted.all()):
        kept = wanted[owner]
        tokens, targets, positions, lengths = tokens[kept], targets[kept], positions[kept], lengths[wanted]
    return MicroBatch(tokens, targets, positions, tuple(lengths.tolist()))


def scored(batch: Sequence[MicroBatch]) -> int:
    """Targets that count, over all micro-batches."""
    return sum(part.scored for part in batch)
