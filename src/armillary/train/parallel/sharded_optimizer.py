"""ZeRO stage 1 for real: torch's ZeroRedundancyOptimizer around whatever optimizer the trainer chose."""

from __future__ import annotations

import copy
from typing import Any

import torch.distributed as dist
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.optim import Optimizer


class ShardedOptimizer(ZeroRedundancyOptimizer):
    """Each rank keeps state for, and updates, its part of the parameters, then sends them to the others.

    Whole parameters go to ranks (the largest first, to the emptiest rank), groups and their options stay as they were.
    """

    def __init__(self, optimizer: Optimizer, group: dist.ProcessGroup) -> None:
        super().__init__([dict(g) for g in optimizer.param_groups], type(optimizer), process_group=group, **optimizer.defaults)

    def state_dict(self) -> dict[str, Any]:
        """The whole optimizer's state, on every rank: all of them must call it."""
        for rank in range(dist.get_world_size(self.process_group)):
            self.consolidate_state_dict(to=rank)
        return copy.copy(super().state_dict())
