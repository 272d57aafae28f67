"""What all ranks must know alike: one decides or all tell, and an error on one is raised on all, because the others would wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from armillary.core.errors import ArmillaryError

Value = TypeVar("Value")


def from_rank_0(make: Callable[[], Value]) -> Value:
    """`make()`, called on rank 0, on every rank. An ArmillaryError or OSError of it is raised on all."""
    if _alone():
        return make()
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [make()]
        except (ArmillaryError, OSError) as error:
            told = [error]
    dist.broadcast_object_list(told)
    if isinstance(told[0], Exception):
        raise told[0]
    value: Value = told[0]
    return value


def gathered(value: Value) -> list[Value]:
    """Every rank's value, in rank order, on every rank."""
    if _alone():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _alone() -> bool:
    return not dist.is_initialized() or dist.get_world_size() == 1
